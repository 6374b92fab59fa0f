"""The banks on the Triton path: rows of every shelf in tables on the device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from turret.kernels.gpu.row_table import RowTable
from turret.kernels.gpu.segment_table import SegmentTable
from turret.kernels.segments import LongSegment
from turret.server.adapters.device.extras import Extras
from turret.server.adapters.device.gpu_gates import GpuGates, GpuStepGates
from turret.server.adapters.device.gpu_shelves import (
    GpuHadamardShelf,
    GpuHadamardShelves,
    GpuKroneckerShelf,
    GpuKroneckerShelves,
    GpuShelf,
)
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Members
from turret.server.adapters.device.shelves import Shelves


class GpuTables(Protocol):
    """Tables of fixed address, of the kind of step at hand."""

    def load_segments(self, runs: Sequence[LongSegment]) -> SegmentTable:
        """Load and return the segment table."""
        ...

    def row_table(self, key: Hashable) -> RowTable:
        """The table of a shelf and a position in the mixes; the same one for the same key."""
        ...

    def fusion_table(self, key: str, ranks: int, components: int) -> SegmentTable:
        """The table of a learned fusion; the same one for the same arguments."""
        ...


@dataclass(frozen=True, slots=True)
class GpuStepShelves:
    """A step's rows of every shelf, by group.

    Attributes:
        by_group: Group → shelves with the tables of their rows, by position in the mixes.
        signature: Names the shelves and how many tables each has: the launches of a step.
    """

    by_group: dict[str, list[tuple[GpuShelf, list[RowTable]]]]
    signature: tuple[tuple[Hashable, int], ...]

    def apply(self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of one layer's fused projection to ``y``, in place."""
        for shelf, tables in self.by_group.get(group, ()):
            if layer in shelf.layers:
                for table in tables:
                    shelf.apply_table(layer, table, x, y)


class GpuShelves(Shelves):
    """All shelves, bound to row tables."""

    def bind_tables(
        self, members: Sequence[tuple[int, int, Members]], tables: GpuTables
    ) -> GpuStepShelves:
        """Bind a step.

        Args:
            members: Runs of rows: first, end, and their mix.
            tables: Hold the row tables.
        """
        by_group: dict[str, list[tuple[GpuShelf, list[RowTable]]]] = {}
        signature = []
        for shape, slots in self.ordered():
            found = [
                [(slot, w) for key, w in mix if (slot := slots.slot(key)) is not None]
                for _, _, mix in members
            ]
            bound = []
            for j in range(max((len(places) for places in found), default=0)):
                rows: list[int] = []
                chosen: list[tuple[int, float]] = []
                for (start, end, _), places in zip(members, found, strict=True):
                    if len(places) > j:
                        rows.extend(range(start, end))
                        chosen.extend([places[j]] * (end - start))
                table = tables.row_table((shape, j))
                table.load(rows, [slot for slot, _ in chosen], [weight for _, weight in chosen])
                bound.append(table)
            if bound:
                shelf = slots.shelf
                assert isinstance(shelf, GpuHadamardShelf | GpuKroneckerShelf)
                by_group.setdefault(shelf.group, []).append((shelf, bound))
                signature.append((shape, len(bound)))
        return GpuStepShelves(by_group, tuple(signature))

    def addresses(self) -> list[object]:
        """Everything a captured graph knows of the shelves."""
        known: list[object] = []
        for shape, slots in self.ordered():
            shelf = slots.shelf
            assert isinstance(shelf, GpuHadamardShelf | GpuKroneckerShelf)
            known += [shape, sorted(shelf.layers), shelf.addresses()]
        return known


class GpuExtras(Extras):
    """Operators outside the pack's matrices, as kernels apply them."""

    def __init__(self, layout: ProjectionLayout, dtype: torch.dtype, device: torch.device) -> None:
        like = (layout, dtype, device)
        self._gpu_banks = GpuShelves(
            (GpuHadamardShelves(*like), GpuKroneckerShelves(*like)), device
        )
        self._fusions = GpuGates(*like)
        super().__init__(device, self._gpu_banks, self._fusions)

    def bind_tables(
        self, runs: Sequence[tuple[int, int, Members]], tables: GpuTables
    ) -> tuple[GpuStepShelves, GpuStepGates]:
        """Bind a step; see ``GpuShelves.bind_tables``."""
        return self._gpu_banks.bind_tables(runs, tables), self._fusions.bind(runs, tables)

    def addresses(self) -> list[object]:
        """Everything a captured graph knows of them."""
        return [*self._gpu_banks.addresses(), *self._fusions.addresses()]
