"""Add the updates of Hadamard adapters to the base result; see ``hadamard_shrink``.

Semantics, per row and per slice ``s`` (columns ``[offset_s, offset_s + out_s)`` of ``y``)::

    y[row, s][o] += weight · Σ_ij w1a[o, i] · u[row, s][i, j] · w2a[o, j]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret.kernels.rows.product import row_product, select_slot

# fp32 elements of the temporary, per piece of rows: 4 MiB stay in cache.
_PIECE_ELEMENTS = 1 << 20


def hadamard_expand_reference(
    y: torch.Tensor,
    u: torch.Tensor,
    w1a: Sequence[torch.Tensor],
    w2a: Sequence[torch.Tensor],
    row_slots: torch.Tensor | int,
    row_weights: torch.Tensor | float,
) -> None:
    """Expand in place by torch products; the CPU path as well as the Triton kernel's oracle.

    Args:
        y: Base results, ``[num_rows, sum(out_s)]``, any float dtype; rows may be strided.
        u: Result of ``hadamard_shrink`` for the same rows, ``[num_rows, num_slices, r, r]`` fp32.
        w1a: Per slice ``[num_slots, out_s, r]``, any float dtype; zero where an adapter has
            nothing. The scaling is folded into one of the factors.
        w2a: Same shapes.
        row_slots: Slot of each row, ``[num_rows]`` int64, every one valid; or one slot for all.
        row_weights: Mix weight of each row, ``[num_rows, 1]`` fp32, or one weight for all.
    """
    views = y.split([table.shape[1] for table in w1a], dim=1)
    for s, (view, left, right) in enumerate(zip(views, w1a, w2a, strict=True)):
        piece = max(1, _PIECE_ELEMENTS // (left.shape[1] * left.shape[2]))
        for start in range(0, y.shape[0], piece):
            rows = slice(start, min(start + piece, y.shape[0]))
            slots = row_slots[rows] if isinstance(row_slots, torch.Tensor) else row_slots
            weights = row_weights[rows] if isinstance(row_weights, torch.Tensor) else row_weights
            part = view[rows]
            delta = _expand(u[rows, s], left, right, slots)
            part.copy_(part.float().add_(delta.mul_(weights)))


def _expand(
    u: torch.Tensor, w1a: torch.Tensor, w2a: torch.Tensor, slots: torch.Tensor | int
) -> torch.Tensor:
    """``[rows, out]`` fp32."""
    left, right = select_slot(w1a, slots), select_slot(w2a, slots)
    # w1a · u transposed, [rows, r, out]: wide rows, and a shared w1a is the product's weight.
    product = row_product(u.transpose(1, 2), left)
    r = product.shape[1]
    terms = product * right.transpose(-1, -2)
    total = terms[:, 0]
    # One by one: the order of a library's sum is its own affair, and zeros change nothing.
    for number in range(1, r):
        total = total + terms[:, number]
    return total
