"""Add the updates of Kronecker adapters (LoKr) on a CPU, over tables that are padded once.

The formula of ``kronecker``, in an order that needs no transposes: ``w1 (X w2ᵀ)``, whose rows and
columns are those of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turret.kernels.rows.tables import COLUMNS, padded, table_product

# fp32 elements of the temporaries, per piece of rows: 4 MiB stay in cache.
_PIECE_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class KroneckerTables:
    """Factors of the rows' adapters for one linear module.

    The first axis is the row, or 1 where all rows share one adapter. ``m``, ``n``, ``k`` and
    ``rank`` are padded to multiples of 16, ``l`` to one of 4, with zeros.

    Attributes:
        w1: ``[rows, l, m]`` fp32, the scaling folded in.
        second: ``w2ᵀ``, ``[rows, n, k]`` fp32, or its factors ``[rows, n, rank]`` and ``[rows,
            rank, k]``.
        shape: ``(out_l, in_m, out_k, in_n)``, without padding.
    """

    w1: torch.Tensor
    second: Sequence[torch.Tensor]
    shape: tuple[int, int, int, int]


def kronecker_rows_(
    x: torch.Tensor, y: torch.Tensor, tables: KroneckerTables, weights: torch.Tensor | float
) -> None:
    """Add in place.

    Args:
        x: ``[rows, in_m · in_n]``, any float dtype.
        y: ``[rows, out_l · out_k]``, any float dtype, rows may be strided; rounded once.
        tables: Factors.
        weights: Mix weight of each row, ``[rows, 1]`` fp32, or one for all.
    """
    out_l, in_m, out_k, in_n = tables.shape
    wide = max(padded(in_n, COLUMNS), *(table.shape[2] for table in tables.second))
    per_row = max(padded(in_m, COLUMNS), tables.w1.shape[1]) * wide
    piece = max(1, _PIECE_ELEMENTS // per_row)
    is_shared = tables.w1.shape[0] == 1
    for start in range(0, x.shape[0], piece):
        rows = slice(start, min(start + piece, x.shape[0]))
        one = slice(None) if is_shared else rows
        count = rows.stop - rows.start
        inner = _padded_matrix(x[rows], in_m, in_n)
        for table in tables.second:
            inner = table_product(inner, table[one])
        w1 = tables.w1[one]
        delta = table_product(w1.expand(count, -1, -1), inner)[:, :out_l, :out_k]
        if isinstance(weights, torch.Tensor):
            delta = delta * weights[rows].unsqueeze(1)
        elif weights != 1.0:
            delta = delta * weights
        part = y[rows].unflatten(1, (out_l, out_k))
        part.copy_(delta + part)


def _padded_matrix(x: torch.Tensor, in_m: int, in_n: int) -> torch.Tensor:
    """Rows of ``x`` as fp32 matrices ``[rows, m, n]``, padded."""
    rows = x.shape[0]
    if in_m % COLUMNS == 0 and in_n % COLUMNS == 0:
        return x.float().view(rows, in_m, in_n)
    wide = torch.zeros(rows, padded(in_m, COLUMNS), padded(in_n, COLUMNS), device=x.device)
    wide[:, :in_m, :in_n] = x.view(rows, in_m, in_n)
    return wide
