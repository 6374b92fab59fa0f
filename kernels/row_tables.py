"""Tables of small matrices for products whose bits do not depend on the batch.

``row_product`` pads its operands at every call. Tables that are multiplied in every layer of every
step are kept padded instead, in fp32 and in the order in which MKL multiplies: rows to multiples of
4, columns and reductions to multiples of 16 (see ``row_product`` for why).
"""

from __future__ import annotations

import torch

ROWS = 4
COLUMNS = 16


def padded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def table_product(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix per row by a matrix per row or by one for all.

    Args:
        x: ``[num_rows, m, k]`` fp32, m a multiple of 4, k of 16 (or 128 at least).
        table: ``[num_rows, k, n]``, or ``[1, k, n]`` for all; fp32, n a multiple of 16.

    Returns:
        ``[num_rows, m, n]``, fp32.
    """
    if table.shape[0] == x.shape[0]:
        return torch.bmm(x, table)
    flat = torch.mm(x.reshape(-1, x.shape[2]), table[0])
    return flat.view(x.shape[0], x.shape[1], -1)
