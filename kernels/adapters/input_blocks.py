"""What blocks change of a row's input (OFT, arXiv 2306.07280; BOFT, arXiv 2311.06243).

``D`` is block-diagonal. With ``x`` read as a matrix ``X`` with a row of ``b`` inputs per block::

    (D x)_n = X_n · blocks_n

The base multiplies ``x + D x``, or ``D x`` on its own where more than that is added up.
"""

from __future__ import annotations

import torch

from turret.kernels.rows.product import row_product


def input_blocks_reference(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Multiply by torch products; the CPU path without compiled kernels, and the kernels' oracle.

    A row's bits do not depend on the other rows.

    Args:
        x: Activations, ``[num_rows, in]``, any float dtype; rows may be strided.
        blocks: ``[in / b, b, b]``, or ``[1, b, b]`` for one that serves all; any float dtype.

    Returns:
        ``D x``, ``[num_rows, in]`` fp32.
    """
    size = blocks.shape[1]
    num_blocks = x.shape[1] // size
    rows = x.float().unflatten(1, (num_blocks, size))
    columns = blocks.float().transpose(1, 2).contiguous()
    if blocks.shape[0] == 1:
        return row_product(rows.contiguous(), columns[0]).flatten(1)
    by_block = row_product(rows.transpose(0, 1).contiguous(), columns)
    return by_block.transpose(0, 1).flatten(1)
