"""``x wᵀ`` per row for a small matrix per row, the bits of a row the same in any batch.

Where ``row_linear`` multiplies vectors, this multiplies ``[m, k]`` matrices: one per row of the
step, by a weight of its own or by a shared one. On a CPU the order of every sum is ours
(``cpu/products.c``, or ``ordered_product.py`` where there are no compiled kernels).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turret.kernels.cpu.native import has_kernels
from turret.kernels.cpu.products import dot_products
from turret.kernels.rows.linear import PIECE_ROWS, linear_in_pieces
from turret.kernels.rows.ordered_product import ordered_product


def row_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix per row by a weight per row or by one for all.

    Args:
        x: ``[num_rows, m, k]``, fp32.
        w: ``[num_rows, n, k]`` or, shared by all rows, ``[n, k]``; fp32. Appending zero rows or
            columns changes no bit of the rest.

    Returns:
        ``[num_rows, m, n]``, fp32. On devices other than the CPU by library products of one shape.
    """
    num_rows, m, _ = x.shape
    if has_kernels(x.device):
        if w.dim() == 3:
            return dot_products(x, w)
        return dot_products(x.reshape(1, num_rows * m, -1), w.unsqueeze(0)).view(num_rows, m, -1)
    if x.device.type != "cpu":
        return _in_pieces(x, w)
    if w.dim() == 2:
        return ordered_product(x.reshape(num_rows * m, -1), w).view(num_rows, m, -1)
    out = x.new_empty(num_rows, m, w.shape[1])
    for row in range(num_rows):
        out[row] = ordered_product(x[row], w[row])
    return out


def _in_pieces(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Compute in pieces of one shape, since a library chooses its algorithm by the shape."""
    num_rows, m, _ = x.shape
    if w.dim() == 2:
        return linear_in_pieces(x.reshape(num_rows * m, -1), w).view(num_rows, m, -1)
    missing = -num_rows % PIECE_ROWS
    pairs = (F.pad(t, (0, 0, 0, 0, 0, missing)).split(PIECE_ROWS) for t in (x, w))
    pieces = [torch.bmm(a, b.transpose(1, 2)) for a, b in zip(*pairs, strict=True)]
    return torch.cat(pieces)[:num_rows]


def select_slot(table: torch.Tensor, slots: torch.Tensor | int) -> torch.Tensor:
    """Pick from ``[num_slots, …]`` in fp32: ``[num_rows, …]`` for a tensor, ``[…]`` for an int."""
    if isinstance(slots, int):
        return table[slots].float()
    return table.index_select(0, slots).float()
