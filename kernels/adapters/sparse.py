"""Add the updates of adapters that change a few entries of a weight: ``Δ(x) = S x``.

``S`` comes as compressed rows: the entries of output ``o`` are
``[row_starts[o], row_starts[o + 1])`` of ``values`` and ``columns``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Of one adapter on one module: no input beyond it can be named by 16 bits.
MAX_INPUTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Jagged:
    """Entries by their place in their rows, the longest rows first (jagged diagonals).

    Attributes:
        values: ``[entries]`` fp32, all first entries of rows, then all second ones, and so on.
        columns: ``[entries]`` int32.
        counts: How many rows have a first entry, a second one, and so on; descending.
        order: The output of every row here, ``[out_features]`` int64.
    """

    values: torch.Tensor
    columns: torch.Tensor
    counts: tuple[int, ...]
    order: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, columns: torch.Tensor, row_starts: torch.Tensor) -> Jagged:
        """From compressed rows.

        Args:
            values: ``[entries]``, any float dtype.
            columns: ``[entries]`` uint16.
            row_starts: ``[out_features + 1]`` int32.
        """
        starts = row_starts.to(torch.int64)
        lengths = starts.diff()
        order = torch.argsort(lengths, descending=True, stable=True)
        longest, firsts = lengths[order], starts[:-1][order]
        most = int(longest[0]) if len(longest) else 0
        steps = torch.arange(most, device=starts.device)
        # Row by row of this is one place in the rows.
        there = steps[:, None] < longest[None, :]
        picked = (firsts[None, :] + steps[:, None])[there]
        counts = tuple(there.sum(1).tolist())
        return cls(values.float()[picked], columns.to(torch.int32)[picked], counts, order)

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.columns.nbytes + self.order.nbytes


def sparse_reference(
    x: torch.Tensor, y: torch.Tensor, entries: Jagged, weights: torch.Tensor | float
) -> None:
    """Add in place; the torch path as well as the other kernels' oracle.

    Every sum is made of single multiplications and additions in the order of the row's entries, so
    a row's bits depend on nothing but itself.

    Args:
        x: Activations, ``[rows, in_features]``, any float dtype.
        y: Base results of one slice, ``[rows, out_features]``, any float dtype; may be a column
            slice of a fused projection. Rounded once.
        entries: One adapter's.
        weights: Mix weight of each row, ``[rows, 1]`` fp32, or one for all.
    """
    wide, at = x.float(), 0
    total = torch.zeros(y.shape, dtype=torch.float32, device=y.device)
    for count in entries.counts:
        these = slice(at, at + count)
        terms = wide.index_select(1, entries.columns[these]).mul_(entries.values[these])
        total[:, :count] += terms
        at += count
    delta = torch.empty_like(total).index_copy_(1, entries.order, total)
    y.copy_(y.float().add_(delta.mul_(weights)))
