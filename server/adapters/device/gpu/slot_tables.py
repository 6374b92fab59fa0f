"""Operators that lie by themselves on the gpu path: Hadamard, Kronecker, low rank of experts.

A *slot table* is the set of tables of one operator of one shape in one place, with a slot for each
adapter. Rows find their adapter's slot in a row table, one for each position in their mixes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from turret.kernels.expert_routing import Routing
from turret.kernels.gpu.experts import add_expert_updates
from turret.kernels.gpu.hadamard import hadamard_expand, hadamard_shrink
from turret.kernels.gpu.kronecker import kronecker
from turret.kernels.gpu.tables import LongSegment, RowTable, SegmentTable, upload
from turret.server.adapters.device.gpu.pack import Form, grown
from turret.server.adapters.device.kernels import has_kernel
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Members
from turret.server.adapters.device.store import Part
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.kronecker import Kronecker
from turret.server.adapters.operators.low_rank import ExpertLowRank
from turret.server.adapters.operators.operator import Operator


class GpuTables(Protocol):
    """Tables of fixed address for the metadata of one kind of step."""

    def load_segments(self, runs: Sequence[LongSegment]) -> SegmentTable:
        """Load and return the segment table."""
        ...

    def row_table(self, key: Hashable) -> RowTable:
        """The table of a slot table and a position in the mixes; the same one for the same key."""
        ...


_LEAST_SLOTS = 4
_Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class SlotTableKey:
    """The content of a slot table: a kind of operator, its place, and the shapes of its tensors.

    ``slice`` is that of the projection; −1 for experts, whose projections are not fused.
    """

    kind: type[Operator]
    projection: str
    slice: int
    shapes: _Shapes

    @property
    def order(self) -> tuple[str, str, int, _Shapes]:
        """Sort key, so that the order of sums does not depend on what the store held before."""
        return self.kind.name, self.projection, self.slice, self.shapes


class SlotTable:
    """The tensors of adapters by slot, in all layers.

    Attributes:
        slots: Slot numbers by adapter key.
        layers: Layers in which some adapter has the operator.
        tables: Per tensor ``[layers, slots, …]``. Of experts one, which says where each adapter's
            factors lie, ``[layers, slots, 2]`` int64 (0: nowhere): they are large, a table with a
            slot for each would leave room for others that do not come.
    """

    def __init__(
        self, key: SlotTableKey, num_layers: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.key = key
        self.slots: dict[str, int] = {}
        self.layers: set[int] = set()
        self._like = {"dtype": dtype, "device": device}
        # Tensors of expert factors by adapter; keeps the addresses in the table valid.
        self._kept: dict[str, list[torch.Tensor]] = {}
        self.is_addressed = key.kind is ExpertLowRank
        if self.is_addressed:
            self.tables = [torch.zeros(num_layers, 0, 2, dtype=torch.int64, device=device)]
        else:
            self.tables = [torch.zeros(num_layers, 0, *shape, **self._like) for shape in key.shapes]

    def put(self, key: str, found: Mapping[int, Operator]) -> None:
        """Take in an adapter's operators, by layer."""
        slot = next(i for i in range(len(self.slots) + 1) if i not in self.slots.values())
        held = self.tables[0].shape[1]
        if slot >= held:
            self.tables = [grown(table, max(_LEAST_SLOTS, 2 * held)) for table in self.tables]
        self.slots[key] = slot
        self.layers.update(found)
        if self.is_addressed:
            self._put_addresses(key, found)
            return
        for table in self.tables:
            table[:, slot] = 0
        for layer, operator in found.items():
            for table, tensor in zip(self.tables, operator.tensors(), strict=True):
                table[layer, slot] = tensor

    def _put_addresses(self, key: str, found: Mapping[int, Operator]) -> None:
        (table,) = self.tables
        addresses = torch.zeros(len(table), 2, dtype=torch.int64)
        kept = self._kept[key] = []
        for layer, operator in found.items():
            own = [tensor.to(**self._like, copy=True) for tensor in operator.tensors()]
            addresses[layer] = torch.tensor([tensor.data_ptr() for tensor in own])
            kept += own
        table[:, self.slots[key]] = upload(addresses, table.device)

    def remove(self, key: str) -> None:
        """Forgets an adapter. Its slot keeps its content, but no step reads it."""
        self.slots.pop(key, None)
        self._kept.pop(key, None)

    def add(self, layer: int, table: RowTable, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of the table's rows to ``y``, the slice's columns, in place."""
        factors = [factor[layer] for factor in self.tables]
        if self.key.kind is Hadamard:
            w1a, w1b, w2a, w2b = factors
            u = hadamard_shrink(x, w1b.unsqueeze(1), w2b.unsqueeze(1), table)
            hadamard_expand(y, u, [w1a], [w2a], table)
        else:
            w1, *second = factors
            kronecker(x, y, w1, second[0] if len(second) == 1 else (second[0], second[1]), table)

    def addresses(self) -> list[object]:
        """Addresses and shapes of the tables, and the layers that use them."""
        return [self.key, sorted(self.layers), [(t.data_ptr(), t.shape) for t in self.tables]]


@dataclass(frozen=True, slots=True)
class GpuStepSlotTables:
    """A step's rows of every slot table.

    Attributes:
        columns: The columns of each slice, by projection.
        by_projection: Slot tables with the tables of their rows, by position in the mixes.
    """

    columns: Mapping[str, Sequence[slice]]
    by_projection: dict[str, list[tuple[SlotTable, list[RowTable]]]] = field(default_factory=dict)

    def apply(self, layer: int, projection: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of one layer's fused projection to ``y``, in place."""
        for slot_table, tables in self._of(layer, projection):
            for table in tables:
                slot_table.add(
                    layer, table, x, y[:, self.columns[projection][slot_table.key.slice]]
                )

    def apply_experts(
        self,
        layer: int,
        projection: str,
        x: torch.Tensor,
        y: torch.Tensor,
        routing: Routing,
        rows: torch.Tensor | None,
    ) -> None:
        """Add the updates of one layer's projection of experts to ``y``, in place."""
        for slot_table, tables in self._of(layer, projection):
            rank, factors = slot_table.key.shapes[0][1], slot_table.tables[0][layer]
            for table in tables:
                add_expert_updates(x, y, factors, rank, table, routing, rows)

    def addresses(self) -> list[object]:
        """Every address and shape that a captured graph depends on."""
        return [
            slot_table.addresses()
            for found in self.by_projection.values()
            for slot_table, _ in found
        ]

    def _of(self, layer: int, projection: str) -> Iterable[tuple[SlotTable, list[RowTable]]]:
        found = self.by_projection.get(projection, ())
        return [(slot_table, tables) for slot_table, tables in found if layer in slot_table.layers]


class GpuSlotTables(Part):
    """All slot tables; made when an adapter needs them.

    Args:
        layout: Shape of the base.
        dtype: Serving dtype.
        device: Where the tables are.
    """

    def __init__(self, layout: ProjectionLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._layout = layout
        self._like = (layout.num_layers, dtype, device)
        self._columns = {name: layout.columns(name) for name in layout.projections}
        self._slot_tables: dict[SlotTableKey, SlotTable] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        found: dict[SlotTableKey, dict[int, Operator]] = {}
        for name, s, layer, part in self._parts(operators):
            shapes = tuple(tuple(tensor.shape) for tensor in part.tensors())
            found.setdefault(SlotTableKey(type(part), name, s, shapes), {})[layer] = part
        for place, parts in found.items():
            if place not in self._slot_tables:
                self._slot_tables[place] = SlotTable(place, *self._like)
            self._slot_tables[place].put(key, parts)

    def _parts(self, operators: AdapterOperators) -> Iterable[tuple[str, int, int, Operator]]:
        for name in self._layout.projections:
            for layer, s, ops in self._layout.of(operators, name):
                for part in (ops.get(Hadamard), ops.get(Kronecker)):
                    if part is not None and has_kernel(part, "gpu"):
                        yield name, s, layer, part
        for name in self._layout.experts:
            for layer, update in self._layout.of_experts(operators, name):
                yield name, -1, layer, update

    def remove(self, key: str) -> None:
        for slot_table in self._slot_tables.values():
            slot_table.remove(key)

    def form(self, mix: Members) -> Iterable[tuple[SlotTableKey, int]]:
        """The slot tables that rows of a mix use, with their positions in it."""
        for place, slot_table in self._slot_tables.items():
            count = sum(key in slot_table.slots for key, _ in mix)
            yield from ((place, position) for position in range(count))

    def bind(
        self, runs: Sequence[tuple[int, int, Members]], tables: GpuTables, form: Form
    ) -> GpuStepSlotTables:
        """Load a step's tables.

        Args:
            runs: Runs of rows: first, end, and their mix.
            tables: Hold the row tables.
            form: What the step launches.
        """
        step = GpuStepSlotTables(self._columns)
        for place, slot_table in sorted(self._slot_tables.items(), key=lambda item: item[0].order):
            if count := sum(kind == place for kind, _ in form):
                bound = _loaded(place, slot_table, runs, tables, count)
                step.by_projection.setdefault(place.projection, []).append((slot_table, bound))
        return step


def _loaded(
    place: SlotTableKey,
    slot_table: SlotTable,
    runs: Sequence[tuple[int, int, Members]],
    tables: GpuTables,
    count: int,
) -> list[RowTable]:
    """The tables of a slot table's rows, by ``count`` positions in the mixes."""
    found = [
        [(slot_table.slots[key], w) for key, w in mix if key in slot_table.slots]
        for _, _, mix in runs
    ]
    bound = []
    for j in range(count):
        rows: dict[int, tuple[int, float]] = {}
        for (start, end, _), members in zip(runs, found, strict=True):
            if len(members) > j:
                rows |= dict.fromkeys(range(start, end), members[j])
        if slot_table.is_addressed:
            # Experts look rows up by number, so every row up to the last needs an entry; slot -1
            # means none.
            rows = {row: rows.get(row, (-1, 0.0)) for row in range(max(rows, default=-1) + 1)}
        table = tables.row_table((place, j))
        slots, weights = [slot for slot, _ in rows.values()], [w for _, w in rows.values()]
        table.load(list(rows), slots, weights)
        bound.append(table)
    return bound
