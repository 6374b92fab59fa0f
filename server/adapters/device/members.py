"""Which rows of a step use which adapters."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch

# The mix of a row or segment as (adapter key, weight) pairs, in the request's order.
Members = Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class StepMembers:
    """Which adapters the rows of a step use.

    Attributes:
        short: Per short row, its mix.
        long: Per long segment, first row, end row, its mix.
        given: Of adapters with a ``TokenRouter``, the scalings of every row of the step,
            ``[rows, modules, components]`` fp32; anything in rows that do not use the adapter.
    """

    short: Sequence[Members]
    long: Sequence[tuple[int, int, Members]]
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def runs(self) -> list[tuple[int, int, Members]]:
        """All rows as runs: first, end, and their mix."""
        return [*((row, row + 1, mix) for row, mix in enumerate(self.short)), *self.long]


def passes(
    runs: Sequence[tuple[int, int, Members]], keys: Container[str]
) -> list[tuple[str, list[int], list[float]]]:
    """The rows of some adapters, position by position in the mixes.

    A row's changes are so added up in its own order, and no adapter twice in one pass.

    Args:
        runs: Runs of rows: first, end, and their mix.
        keys: The adapters; others are passed over.

    Returns:
        Adapters, with the numbers of rows that have them at the same position, and mix weights.
    """
    mixes = [[(key, w) for key, w in mix if key in keys] for _, _, mix in runs]
    found: list[tuple[str, list[int], list[float]]] = []
    for position in range(max(map(len, mixes), default=0)):
        users: dict[str, tuple[list[int], list[float]]] = {}
        for (start, end, _), mix in zip(runs, mixes, strict=True):
            if len(mix) > position:
                key, weight = mix[position]
                rows, weights = users.setdefault(key, ([], []))
                rows.extend(range(start, end))
                weights.extend([weight] * (end - start))
        found += [(key, *rows) for key, rows in users.items()]
    return found


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that use a table: numbers, slots and mix weights; or rows that share one slot.

    ``run`` is the slots as a slice of the table where that is what they are: a view of it then
    serves where a gather would copy.
    """

    rows: torch.Tensor | slice
    slots: torch.Tensor | int
    weights: torch.Tensor | float
    run: slice | None = None

    def pick(self, table: torch.Tensor) -> torch.Tensor:
        """The table's entries per row, ``[rows, …]``, or ``[1, …]`` if all rows share one."""
        if self.run is not None:
            return table[self.run]
        assert isinstance(self.slots, torch.Tensor)
        return table.index_select(0, self.slots)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows)

    def put(self, y: torch.Tensor, part: torch.Tensor) -> None:
        """Write back what ``take`` gave (a run is a view: nothing to do)."""
        if not isinstance(self.rows, slice):
            y.index_copy_(0, self.rows, part)
