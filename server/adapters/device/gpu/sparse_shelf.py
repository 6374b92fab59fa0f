"""Sparse updates on the gpu path: the entries of all adapters side by side, a range for each."""

from __future__ import annotations

import torch

from turret.kernels.gpu.adapters.sparse import sparse
from turret.kernels.gpu.tables.row_table import RowTable
from turret.server.adapters.device.gpu.shelf_kind import GpuShelfKind
from turret.server.adapters.device.hadamard_shelf import grown
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.updates import Sparse

# How much larger than what is needed the room for entries becomes when it grows.
_SPARE = 1.25


class GpuSparseShelf:
    """The entries of one slice of a projection, in all layers.

    Attributes:
        values: ``[room]``, serving dtype.
        columns: ``[room]`` uint16.
        row_starts: ``[layers, slots, out_features + 1]`` int32, from the module's first entry on.
        firsts: ``[layers, slots]`` int64, each module's first entry.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        projection: str,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.projection = projection
        self.layers: set[int] = set()
        self._layout = layout
        self._index = index
        self._span = layout.columns(projection)[index]
        out = layout.projections[projection][index].out_features
        shape = (layout.num_layers, 0)
        self.row_starts = torch.zeros(*shape, out + 1, dtype=torch.int32, device=device)
        self.firsts = torch.zeros(shape, dtype=torch.int64, device=device)
        self.values = torch.zeros(1, dtype=dtype, device=device)
        self.columns = torch.zeros(1, dtype=torch.uint16, device=device)
        # Where each slot's entries are: first and end.
        self._ranges: dict[int, tuple[int, int]] = {}

    def grow(self, num_slots: int) -> None:
        """Make room for ``num_slots`` adapters."""
        self.row_starts = grown(self.row_starts, num_slots)
        self.firsts = grown(self.firsts, num_slots)

    def put(self, slot: int, operators: AdapterOperators) -> None:
        """Copy an adapter's entries of this slice into a slot."""
        parts = [
            (layer, ops.sparse)
            for layer, s, ops in self._layout.of(operators, self.projection)
            if s == self._index and ops.sparse is not None
        ]
        at = self._take(slot, sum(len(part.values) for _, part in parts))
        self.row_starts[:, slot] = 0
        for layer, part in parts:
            self.layers.add(layer)
            self._copy(part, layer, slot, at)
            at += len(part.values)

    def clear(self, slot: int) -> None:
        """Let another adapter have the slot's entries."""
        self._ranges.pop(slot, None)

    def apply_table(self, layer: int, table: RowTable, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of the table's rows to ``y``, in place."""
        starts, firsts = self.row_starts[layer], self.firsts[layer]
        sparse(x, y[:, self._span], self.values, self.columns, starts, firsts, table)

    def addresses(self) -> list[object]:
        """Where its tables are, and how large."""
        tables = (self.values, self.columns, self.row_starts, self.firsts)
        return [(table.data_ptr(), table.shape) for table in tables]

    def _copy(self, part: Sparse, layer: int, slot: int, at: int) -> None:
        end = at + len(part.values)
        self.values[at:end] = part.values
        self.columns[at:end] = part.columns
        self.row_starts[layer, slot] = part.row_starts
        # A number in the launch: nothing is uploaded.
        self.firsts[layer, slot].fill_(at)

    def _take(self, slot: int, count: int) -> int:
        """The first entry of a range for the slot, in the first gap that is large enough."""
        self._ranges.pop(slot, None)
        at = 0
        for first, end in sorted(self._ranges.values()):
            if first - at >= count:
                break
            at = end
        if at + count > len(self.values):
            room = int((at + count) * _SPARE)
            self.values = _longer(self.values, room)
            self.columns = _longer(self.columns, room)
        self._ranges[slot] = (at, at + count)
        return at


class GpuSparseShelves(GpuShelfKind[GpuSparseShelf, int]):
    """Makes a shelf per (projection, slice)."""

    name = "sparse"

    def keys(self, operators: AdapterOperators, projection: str) -> set[int]:
        found = self.layout.of(operators, projection)
        return {s for _, s, ops in found if ops.sparse is not None}

    def make(self, projection: str, key: int) -> GpuSparseShelf:
        return GpuSparseShelf(self.layout, projection, key, self.dtype, self.device)


def _longer(table: torch.Tensor, size: int) -> torch.Tensor:
    longer = torch.zeros(size, dtype=table.dtype, device=table.device)
    longer[: len(table)] = table
    return longer
