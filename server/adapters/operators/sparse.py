"""``Δ(x) = S x``, where ``S`` is 0 except for a few entries (SHiRA, WaveFT, Super-Tuning).

Each output's sum is computed by single multiplications and additions, in the order of its entries.
The first entries of all outputs are added at once, then all second entries, and so on. For this
purpose, the outputs are sorted by their number of entries, the largest first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from turret.lazy_torch import torch
from turret.server.adapters.operators import BaseRows, Operator, ServedWeight


@dataclass(frozen=True, slots=True)
class Jagged:
    """Entries by their position in their rows, the longest rows first (jagged diagonals).

    Attributes:
        values: ``[entries]`` fp32, all first entries of rows, then all second ones, and so on.
        columns: ``[entries]`` int32.
        counts: The numbers of rows with a first entry, a second one, and so on; descending.
        order: The output that each row computes, ``[out_features]`` int64.
    """

    values: torch.Tensor
    columns: torch.Tensor
    counts: tuple[int, ...]
    order: torch.Tensor


@dataclass(frozen=True)
class Sparse(Operator):
    """Adds the update of the formula above; ``S`` is stored as compressed rows.

    Attributes:
        values: ``[entries]``, serving dtype, the scaling folded in.
        columns: The input of each entry, ``[entries]`` uint16.
        row_starts: The entries of output ``o`` are ``[row_starts[o], row_starts[o + 1])``,
            ``[out_features + 1]`` int32.
    """

    name = "sparse"

    values: torch.Tensor
    columns: torch.Tensor
    row_starts: torch.Tensor

    def rows(self) -> torch.Tensor:
        """The output of each entry, ``[entries]`` int64."""
        lengths = self.row_starts.to(torch.int64).diff()
        return torch.repeat_interleave(lengths)

    @cached_property
    def jagged(self) -> Jagged:
        """The entries in the order in which they are added."""
        starts = self.row_starts.to(torch.int64)
        lengths = starts.diff()
        order = torch.argsort(lengths, descending=True, stable=True)
        longest, firsts = lengths[order], starts[:-1][order]
        most = int(longest[0]) if len(longest) else 0
        steps = torch.arange(most, device=starts.device)
        # Element [k, r] says whether row r has a k-th entry. Masking with this matrix lists all
        # first entries, then all second ones.
        there = steps[:, None] < longest[None, :]
        picked = (firsts[None, :] + steps[:, None])[there]
        counts = tuple(there.sum(1).tolist())
        columns = self.columns.to(torch.int32)[picked]
        return Jagged(self.values.float()[picked], columns, counts, order)

    def prepare(self) -> None:
        _ = self.jagged

    @property
    def prepared_bytes(self) -> int:
        return 8 * (len(self.values) + len(self.row_starts) - 1)

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        entries, wide, at = self.jagged, x.float(), 0
        total = torch.zeros(y.shape, dtype=torch.float32, device=y.device)
        for count in entries.counts:
            these = slice(at, at + count)
            terms = wide.index_select(1, entries.columns[these]).mul_(entries.values[these])
            total[:, :count] += terms
            at += count
        y += torch.empty_like(total).index_copy_(1, entries.order, total).mul_(weight)

    def add_dense(self, total: torch.Tensor, served: ServedWeight, weight: float) -> None:
        places = self.rows(), self.columns.to(torch.int64)
        total.index_put_(places, self.values.float() * weight, accumulate=True)
