"""Project rows onto the rank space of Hadamard adapters (LoHa, arXiv 2108.06098).

The update ``Δ(x) = ((w1a w1b) ⊙ (w2a w2b)) x`` is never built. With ``r`` the rank of the factors::

    U = w1b · diag(x) · w2bᵀ        [r, r]           (this file)
    Δ(x)_o = w1a[o] · U · w2a[o]ᵀ                    (hadamard_expand)
"""

from __future__ import annotations

import torch

from turret.kernels.rows.product import row_product

# fp32 elements of the temporary, per piece of rows: 4 MiB stay in cache.
_PIECE_ELEMENTS = 1 << 20


def hadamard_shrink_reference(
    x: torch.Tensor, w1b: torch.Tensor, w2b: torch.Tensor, row_slots: torch.Tensor | int
) -> torch.Tensor:
    """Shrink by torch products; the CPU path as well as the Triton kernel's oracle.

    A row's bits depend neither on the other rows, nor on how far the tables are padded in rank,
    nor on whether its slot came in a tensor or as one number.

    Args:
        x: Activations, ``[num_rows, in_features]``, any float dtype, rows may be strided.
        w1b: ``[num_slots, num_slices, r, in_features]``, any float dtype. Ranks past an adapter's
            own, and the slices it lacks, are zero.
        w2b: Same shape.
        row_slots: Slot of each row, ``[num_rows]`` int64, every one valid; or one slot for all.

    Returns:
        ``u``, ``[num_rows, num_slices, r, r]``, fp32.
    """
    num_rows, in_features = x.shape
    num_slices, r = w1b.shape[1:3]
    out = torch.empty(num_rows, num_slices, r, r, device=x.device)
    piece = max(1, _PIECE_ELEMENTS // (num_slices * r * in_features))
    for start in range(0, num_rows, piece):
        rows = slice(start, min(start + piece, num_rows))
        part = x[rows].float().view(-1, 1, in_features)
        count = part.shape[0]
        if isinstance(row_slots, int):
            for s in range(num_slices):
                left = part * w1b[row_slots, s].float()
                out[rows, s] = row_product(left, w2b[row_slots, s].float())
        else:
            slots = row_slots[rows]
            left = w1b.index_select(0, slots).float() * part.unsqueeze(1)
            right = w2b.index_select(0, slots).float()
            shape = (count * num_slices, r, in_features)
            product = row_product(left.view(shape), right.view(shape))
            out[rows] = product.unflatten(0, (count, num_slices))
    return out
