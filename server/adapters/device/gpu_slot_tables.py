"""Operators outside the pack on the gpu path: Hadamard, Kronecker, and low-rank updates of experts.

A *slot table* contains the addresses of each adapter's tensors, for operators of one kind and shape
in one module. Rows find their adapter's slot in a row table. There is one row table for each
position in the mixes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from turret.kernels.expert_routing import sort_pairs
from turret.kernels.gpu.experts import add_expert_updates
from turret.kernels.gpu.hadamard import hadamard_expand, hadamard_shrink
from turret.kernels.gpu.kronecker import kronecker
from turret.kernels.gpu.tables import (
    ROW_TABLE_MULTIPLE,
    RowTable,
    RunOfRows,
    SegmentTable,
    upload,
)
from turret.server.adapters.device import (
    ExpertPairs,
    Members,
    Part,
    ProjectionLayout,
    has_kernel,
)
from turret.server.adapters.device.gpu_pack import GpuPack, StepForm, padded
from turret.server.adapters.device.gpu_uploads import aligned, apart
from turret.server.adapters.operators import Operator
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.kronecker import Kronecker
from turret.server.adapters.operators.low_rank import ExpertLowRank


class GpuTables(Protocol):
    """Tables of fixed address for the metadata of one kind of step."""

    def load_segments(self, runs: Sequence[RunOfRows]) -> SegmentTable:
        """Load and return the segment table."""
        ...

    def row_table(self, key: Hashable) -> RowTable:
        """The row table for a key: a slot table's key and a position in the mixes.

        The same key always returns the same table.
        """
        ...


_Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class SlotTableKey:
    """The content of a slot table: a kind of operator, its place, and the shapes of its tensors.

    ``slice`` is the index of a slice in the projection, or −1 for experts, whose projections have
    no slices.
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
    """The addresses of adapters' tensors, by slot of the pack, in all layers.

    Each adapter's tensors have memory of their own, so they stay in place when others are added.

    Attributes:
        slots: Slot numbers by adapter key.
        layers: Layers in which some adapter has the operator.
        table: Addresses, ``[layers, slots, tensors]`` int64; 0 for a layer that an adapter does not
            change.
    """

    def __init__(
        self,
        key: SlotTableKey,
        num_layers: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.key = key
        self.slots: dict[str, int] = {}
        self.layers: set[int] = set()
        self._dtype = dtype
        # Tensors by adapter; keeps the addresses in the table valid.
        self._kept: dict[str, list[torch.Tensor]] = {}
        shape = (num_layers, num_slots, len(key.shapes))
        self.table = torch.zeros(shape, dtype=torch.int64, device=device)

    @property
    def is_addressed(self) -> bool:
        """Whether the kernel finds a row's entry at the row's number, not by searching for it."""
        return self.key.kind is ExpertLowRank

    def put(self, key: str, slot: int, found: Mapping[int, Operator]) -> torch.Tensor:
        """Add an adapter's operators, by layer.

        Returns:
            The addresses for its slot, ``[layers, tensors]`` on the host.
        """
        table, kept = self.table, self._kept.setdefault(key, [])
        words = torch.zeros(table.shape[0], table.shape[2], dtype=torch.int64)
        for n in range(table.shape[2]):
            tensors = ((layer, operator.tensors()[n]) for layer, operator in found.items())
            places = apart(tensors, kept, table.device, lambda stack: stack.to(self._dtype))
            words[list(found), n] = torch.tensor(places)
        self.slots[key] = slot
        self.layers.update(found)
        return words

    def remove(self, key: str) -> None:
        """Forgets an adapter. Its addresses stay in the table, but no step reads them."""
        self.slots.pop(key, None)
        self._kept.pop(key, None)

    def add(self, layer: int, table: RowTable, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of the table's rows to ``y``, the slice's columns, in place."""
        factors, shapes = self.table[layer], self.key.shapes
        if self.key.kind is Hadamard:
            u = hadamard_shrink(x, factors, shapes[0][1], table)
            hadamard_expand(y, u, factors, table)
        else:
            kronecker(x, y, factors, shapes, table)

    def addresses(self) -> list[object]:
        """The table's address, and the layers that use it."""
        return [self.key, sorted(self.layers), self.table.data_ptr()]


@dataclass(frozen=True, slots=True)
class GpuStepSlotTables:
    """The rows of a step that use slot tables.

    Attributes:
        columns: The columns of each slice, by projection.
        by_projection: For each projection, its slot tables, each with one row table per position
            in the mixes.
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

    def apply_experts(self, pairs: ExpertPairs) -> None:
        """Add the updates of experts to ``pairs.y``, in place; see ``AdapterStep``."""
        routing, rows = pairs.routing, pairs.rows
        for slot_table, tables in self._of(pairs.layer, pairs.projection):
            rank, factors = slot_table.key.shapes[0][1], slot_table.table[pairs.layer]
            for table in tables:
                add_expert_updates(pairs.x, pairs.y, factors, rank, table, routing, rows)

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
    """All slot tables.

    A slot table is created for the first adapter that needs it, and dropped with the last one.

    Args:
        layout: Shape of the base.
        pack: The pack, which gives adapters their slots; an adapter enters it first.
        dtype: Serving dtype.
        device: The device of the tables.
    """

    def __init__(
        self, layout: ProjectionLayout, pack: GpuPack, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layout = layout
        self._pack = pack
        self._like = (layout.num_layers, padded(pack.num_slots, 8), dtype, device)
        self._columns = {name: layout.columns(name) for name in layout.projections}
        self._slot_tables: dict[SlotTableKey, SlotTable] = {}
        self._compiled: set[SlotTableKey] = set()

    def insert(self, key: str, operators: AdapterOperators) -> None:
        slot, words = self._pack.places[key].slot, dict[SlotTableKey, torch.Tensor]()
        for place, parts in self._by_key(operators).items():
            if place not in self._slot_tables:
                self._slot_tables[place] = SlotTable(place, *self._like)
            words[place] = self._slot_tables[place].put(key, slot, parts)
        if words:
            flat = upload(torch.cat([one.flatten() for one in words.values()]), self._like[-1])
            split = flat.split([one.numel() for one in words.values()])
            for (place, one), part in zip(words.items(), split, strict=True):
                self._slot_tables[place].table[:, slot] = part.view(one.shape)

    def compile(self, operators: AdapterOperators) -> None:
        """Launch an adapter's kernels on no rows, so that its steps need not compile any."""
        num_layers, _, dtype, device = self._like
        for place in self._by_key(operators).keys() - self._compiled:
            table = RowTable(ROW_TABLE_MULTIPLE, device)
            table.load([], [], [])
            slot_table = SlotTable(place, num_layers, 1, dtype, device)
            if slot_table.is_addressed:
                shape = self._layout.experts[place.projection]
                x = torch.empty(1, shape.in_features, dtype=dtype, device=device)
                y = torch.empty(1, shape.out_features, dtype=dtype, device=device)
                nobody = torch.zeros(1, 1, dtype=torch.int64, device=device)
                routing = sort_pairs(nobody, nobody.float(), shape.count)
                for rows in (None, nobody[0]):
                    rank, factors = place.shapes[0][1], slot_table.table[0]
                    add_expert_updates(x, y, factors, rank, table, routing, rows)
            else:
                slices = self._layout.projections[place.projection]
                width = self._layout.width(place.projection)
                x = torch.empty(1, slices[0].in_features, dtype=dtype, device=device)
                y = torch.empty(1, width, dtype=dtype, device=device)
                slot_table.add(0, table, x, y[:, self._columns[place.projection][place.slice]])
            self._compiled.add(place)

    def extra_bytes(self, operators: AdapterOperators) -> int:
        """Bytes of the tables, and of the padding between tensors."""
        more = 0
        for place, parts in self._by_key(operators).items():
            more += 8 * self._like[0] * self._like[1] * len(place.shapes)
            tensors = [tensor for part in parts.values() for tensor in part.tensors()]
            more += sum(aligned(tensor.nbytes) - tensor.nbytes for tensor in tensors)
        return more

    def _by_key(self, operators: AdapterOperators) -> dict[SlotTableKey, dict[int, Operator]]:
        found: dict[SlotTableKey, dict[int, Operator]] = {}
        for name, s, layer, part in self._parts(operators):
            shapes = tuple(tuple(tensor.shape) for tensor in part.tensors())
            found.setdefault(SlotTableKey(type(part), name, s, shapes), {})[layer] = part
        return found

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
        for place, slot_table in list(self._slot_tables.items()):
            slot_table.remove(key)
            if not slot_table.slots:
                del self._slot_tables[place]

    def form(self, mix: Members) -> Iterable[tuple[SlotTableKey, int]]:
        """The slot tables that rows of a mix use, with the positions of their members."""
        for place, slot_table in self._slot_tables.items():
            count = sum(key in slot_table.slots for key, _ in mix)
            yield from ((place, position) for position in range(count))

    def bind(
        self, runs: Sequence[tuple[int, int, Members]], tables: GpuTables, form: StepForm
    ) -> GpuStepSlotTables:
        """Load a step's tables.

        Args:
            runs: Runs of rows, one for each sequence: first row, end, and mix.
            tables: The holders of the row tables.
            form: The kinds of kernels that the step launches.
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
    slots = slot_table.slots
    found = [[(slots[key], w) for key, w in mix if key in slots] for _, _, mix in runs]
    bound = []
    for j in range(count):
        rows: dict[int, tuple[int, float]] = {}
        for (start, end, _), members in zip(runs, found, strict=True):
            if len(members) > j:
                rows |= dict.fromkeys(range(start, end), members[j])
        if slot_table.is_addressed:
            # The experts' kernel finds rows by their number, so every row up to the last one needs
            # an entry. Slot -1 stands for no adapter.
            rows = {row: rows.get(row, (-1, 0.0)) for row in range(max(rows, default=-1) + 1)}
        table = tables.row_table((place, j))
        slots, weights = [slot for slot, _ in rows.values()], [w for _, w in rows.values()]
        table.load(list(rows), slots, weights)
        bound.append(table)
    return bound
