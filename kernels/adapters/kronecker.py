"""Add the updates of Kronecker adapters (LoKr, LyCORIS arXiv 2309.14859) to the base result.

With ``x`` read as a matrix ``X`` of ``[in_m, in_n]``, row-major::

    Δ(x) = kron(w1, w2) x = vec(w1 · X · w2ᵀ)         kron(w1, w2)[(i,k), (j,l)] = w1[i,j] · w2[k,l]
"""

from __future__ import annotations

import torch

from turret.kernels.rows.product import row_product, select_slot

# fp32 elements of the temporaries, per piece of rows: 4 MiB stay in cache.
_PIECE_ELEMENTS = 1 << 20

# A dense second factor [num_slots, out_k, in_n], or its two factors [num_slots, out_k, r] and
# [num_slots, r, in_n].
SecondFactor = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def kronecker_reference(
    x: torch.Tensor,
    y: torch.Tensor,
    w1: torch.Tensor,
    w2: SecondFactor,
    row_slots: torch.Tensor | int,
    row_weights: torch.Tensor | float,
) -> None:
    """Add in place by torch products; the CPU path as well as the Triton kernel's oracle.

    A row's bits depend neither on the other rows, nor on how far ``r`` is padded, nor on whether
    its slot came in a tensor or as one number.

    Args:
        x: Activations, ``[num_rows, in_m · in_n]``, any float dtype; rows may be strided.
        y: Base results of one slice, ``[num_rows, out_l · out_k]``, any float dtype; may be a
            column slice of a fused projection.
        w1: ``[num_slots, out_l, in_m]``, any float dtype, the scaling folded in.
        w2: ``[num_slots, out_k, in_n]``, or ``(w2a, w2b)``: ``[num_slots, out_k, r]`` and
            ``[num_slots, r, in_n]``.
        row_slots: Slot of each row, ``[num_rows]`` int64, every one valid; or one slot for all.
        row_weights: Mix weight of each row, ``[num_rows, 1]`` fp32, or one weight for all.
    """
    out_l, in_m = w1.shape[1:]
    in_n = x.shape[1] // in_m
    factors = (w2,) if isinstance(w2, torch.Tensor) else (w2[1], w2[0])
    out_k = factors[-1].shape[1]
    per_row = max(in_m, out_l) * max(in_n, out_k)
    if not isinstance(row_slots, int):
        per_row += max(factor.shape[1] * factor.shape[2] for factor in factors)
    piece = max(1, _PIECE_ELEMENTS // per_row)
    for start in range(0, x.shape[0], piece):
        rows = slice(start, min(start + piece, x.shape[0]))
        slots = row_slots[rows] if isinstance(row_slots, torch.Tensor) else row_slots
        # [rows, in_m, in_n] → [rows, in_m, out_k] → [rows, out_k, out_l] → [rows, out_l, out_k]
        inner = x[rows].float().unflatten(1, (in_m, in_n))
        for factor in factors:
            inner = row_product(inner, select_slot(factor, slots))
        outer = row_product(inner.transpose(1, 2).contiguous(), select_slot(w1, slots))
        delta = outer.transpose(1, 2).reshape(outer.shape[0], out_l * out_k)
        weights = row_weights[rows] if isinstance(row_weights, torch.Tensor) else row_weights
        part = y[rows]
        part.copy_(part.float().add_(delta.mul_(weights)))
