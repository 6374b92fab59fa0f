"""Add the updates of Hadamard adapters (LoHa) on a CPU: shrink and expand in few wide calls.

The formula of ``hadamard_shrink`` and ``hadamard_expand`` over tables that are padded once; with
``j`` the rank of the second pair and ``i`` that of the first::

    u[j, i] = Σ_x w2b[j, x] x w1b[i, x]        Δ(x)_o = Σ_j w2a[j, o] · Σ_i u[j, i] w1a[i, o]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turret.kernels.rows.tables import table_product

# fp32 elements of the temporaries, per piece of rows: 4 MiB stay in cache.
_PIECE_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class HadamardTables:
    """Factors of the rows' adapters for one layer's fused projection.

    The first axis is the row, or 1 where all rows share one adapter.

    Attributes:
        w1b: ``[rows, slices, in, i]`` fp32, ``i`` a multiple of 16 (zero past the rank).
        w2b: ``[rows, slices, j, in]`` fp32, ``j`` a multiple of 4.
        w1a: Per slice ``[rows, i, out]`` fp32, out padded to a multiple of 16.
        w2a: Per slice ``[rows, j, out]`` fp32, as wide.
    """

    w1b: torch.Tensor
    w2b: torch.Tensor
    w1a: Sequence[torch.Tensor]
    w2a: Sequence[torch.Tensor]


def hadamard_rows_(
    x: torch.Tensor,
    y: torch.Tensor,
    tables: HadamardTables,
    widths: Sequence[int],
    weights: torch.Tensor | float,
) -> None:
    """Add in place.

    Args:
        x: ``[rows, in]``, any float dtype.
        y: ``[rows, sum(widths)]``, any float dtype; each value is rounded once.
        tables: Factors, the scaling folded into one of them.
        widths: Outputs of each slice.
        weights: Mix weight of each row, ``[rows, 1]`` fp32, or one for all.
    """
    slices, j, in_features = tables.w2b.shape[1:]
    piece = max(1, _PIECE_ELEMENTS // (j * max(slices * in_features, sum(widths))))
    is_shared = tables.w2b.shape[0] == 1
    for start in range(0, x.shape[0], piece):
        rows = slice(start, min(start + piece, x.shape[0]))
        one = slice(None) if is_shared else rows
        delta = _delta(
            x[rows].float(),
            HadamardTables(
                tables.w1b[one],
                tables.w2b[one],
                [table[one] for table in tables.w1a],
                [table[one] for table in tables.w2a],
            ),
            widths,
        )
        if isinstance(weights, torch.Tensor):
            delta.mul_(weights[rows])
        elif weights != 1.0:
            delta.mul_(weights)
        part = y[rows]
        part.copy_(delta.add_(part))


def _delta(x: torch.Tensor, tables: HadamardTables, widths: Sequence[int]) -> torch.Tensor:
    """``Δ(x)``, ``[rows, sum(widths)]`` fp32."""
    slices, j = tables.w2b.shape[1:3]
    rows = x.shape[0]
    left = x.view(rows, 1, 1, -1) * tables.w2b  # [rows, slices, j, in]
    out_shape = (rows, slices, j, tables.w1b.shape[3])
    if tables.w1b.shape[0] == rows:
        u = table_product(left.flatten(0, 1), tables.w1b.flatten(0, 1)).view(out_shape)
    else:
        u = x.new_empty(out_shape)
        for s in range(slices):
            u[:, s] = table_product(left[:, s], tables.w1b[:, s])
    out = x.new_empty(rows, sum(widths))
    offset = 0
    for s, width in enumerate(widths):
        terms = table_product(u[:, s], tables.w1a[s]).mul_(tables.w2a[s])  # [rows, j, out]
        total = out[:, offset : offset + width]
        total.copy_(terms[:, 0, :width])
        # One by one: the order of a library's sum is its own affair.
        for number in range(1, j):
            total += terms[:, number, :width]
        offset += width
    return out
