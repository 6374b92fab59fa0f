"""What the gpu path's parts load a step's metadata into."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from turret.kernels.adapters.segments import LongSegment
from turret.kernels.gpu.tables import RowTable, SegmentTable


class GpuTables(Protocol):
    """Tables of fixed address, of the kind of step at hand."""

    def load_segments(self, runs: Sequence[LongSegment]) -> SegmentTable:
        """Load and return the segment table."""
        ...

    def row_table(self, key: Hashable) -> RowTable:
        """The table of a shelf and a position in the mixes; the same one for the same key."""
        ...
