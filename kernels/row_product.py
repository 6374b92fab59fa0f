"""``x wᵀ`` per row for a small matrix per row, the bits of a row the same in any batch.

Where ``row_linear`` multiplies vectors, this multiplies ``[m, k]`` matrices: one per row of the
step, by a weight of its own or by a shared one. MKL's sgemm rounds a row of a product differently
when the product has 1-3 rows, fewer than 16 columns, an odd edge, or a short reduction. Over shapes
that are multiples of 4 rows, 16 columns and a reduction of 16 the bits were the same for every
batch, every zero padding and for the batched and the flat call (measured: m 1-64, n 16-1024,
k 24-14336, 1-4 threads). So operands are padded up to such multiples with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_ROW_MULTIPLE = 4
_COLUMN_MULTIPLE = 16
_SHORT_REDUCTION = 128
_REDUCTION_MULTIPLE = 16


def row_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix per row by a weight per row or by one for all.

    Args:
        x: ``[num_rows, m, k]``, fp32.
        w: ``[num_rows, n, k]`` or, shared by all rows, ``[n, k]``; fp32. Appending zero rows or
            columns changes no bit of the rest.

    Returns:
        ``[num_rows, m, n]``, fp32; a view if something was padded.
    """
    num_rows, m, k = x.shape
    n = w.shape[-2]
    more_k = -k % _REDUCTION_MULTIPLE if k < _SHORT_REDUCTION else 0
    more_m, more_n = -m % _ROW_MULTIPLE, -n % _COLUMN_MULTIPLE
    if more_k or more_m:
        x = F.pad(x, (0, more_k, 0, more_m))
    if more_k or more_n:
        w = F.pad(w, (0, more_k, 0, more_n))
    if w.dim() == 2:
        out = F.linear(x.reshape(-1, x.shape[2]), w).view(num_rows, x.shape[1], -1)
    else:
        out = torch.bmm(x, w.transpose(1, 2))
    return out[:, :m, :n]


def select_slot(table: torch.Tensor, slots: torch.Tensor | int) -> torch.Tensor:
    """Pick from ``[num_slots, …]`` in fp32: ``[num_rows, …]`` for a tensor, ``[…]`` for an int."""
    if isinstance(slots, int):
        return table[slots].float()
    return table.index_select(0, slots).float()
