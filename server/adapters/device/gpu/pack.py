"""Low-rank updates side by side in wide matrices; gains and biases in tables.

Both are as large from the start as their budget: captured steps know where they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch

from turret.server.adapters.device.gpu.uploads import by_layers
from turret.server.adapters.device.kernels import has_kernel
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.store import Part
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.gate import Gate
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.vectors import Bias, Gain

# The launches of a step, as kinds of packed operators with their projections, and slot tables with
# positions in the mixes. A step can run in any form that contains its own: kernels that it has no
# use for find empty tables.
Form = frozenset[tuple[Hashable, Hashable]]

# Rank ranges start at multiples of this.
RANK_ALIGNMENT = 8


@dataclass(slots=True)
class Place:
    """Ranks ``[rank_start, rank_end)`` of every matrix, and a slot of every table."""

    rank_start: int
    rank_end: int
    slot: int


class Placement:
    """Gives places to adapters, by key.

    Args:
        capacity: Ranks there are places for.
        num_slots: Number of slots at first, without the neutral slot 0.

    Attributes:
        num_slots: Slots there are places for, slot 0 included.
    """

    def __init__(self, capacity: int, num_slots: int) -> None:
        self._capacity = capacity
        self._places: dict[str, Place] = {}
        self.num_slots = num_slots + 1

    @property
    def places(self) -> Mapping[str, Place]:
        return self._places

    @staticmethod
    def width_of(rank: int) -> int:
        """Number of ranks that an adapter with this largest rank occupies."""
        return -(-rank // RANK_ALIGNMENT) * RANK_ALIGNMENT

    def has_room(self, width: int) -> bool:
        """Whether ``width`` ranks are free side by side."""
        return self._find(width) is not None

    def has_slots(self, count: int) -> bool:
        """Whether ``count`` slots are free, so that no table has to grow."""
        return len(self._places) + count < self.num_slots

    def put(self, key: str, width: int) -> Place:
        """Places an adapter at the first gap that fits; the caller has made room."""
        start = self._find(width)
        assert start is not None, "the pack makes room before an adapter is placed"
        place = self._places[key] = Place(start, start + width, self._find_slot())
        return place

    def remove(self, key: str) -> None:
        self._places.pop(key, None)

    def compact(self) -> list[tuple[int, int, int]]:
        """Bring all adapters together at the front.

        Returns:
            What moved: first rank and end, and the first rank from now on. No adapter moves up, and
            made in this order within the same matrices no move overwrites what a later one takes.
        """
        cursor, moves = 0, []
        for place in sorted(self._places.values(), key=lambda place: place.rank_start):
            size = place.rank_end - place.rank_start
            moves.append((place.rank_start, place.rank_end, cursor))
            place.rank_start = cursor
            cursor = place.rank_end = cursor + size
        return moves

    def _find(self, width: int) -> int | None:
        if width == 0:
            return 0
        taken = sorted((p.rank_start, p.rank_end) for p in self._places.values())
        cursor = 0
        for start, end in (*taken, (self._capacity, self._capacity)):
            if cursor + width <= start:
                return cursor
            cursor = max(cursor, end)
        return None

    def _find_slot(self) -> int:
        taken = {place.slot for place in self._places.values()}
        slot = next(i for i in range(1, len(taken) + 2) if i not in taken)
        while self.num_slots <= slot:
            self.num_slots *= 2
        return slot


# Every slot costs rows in the tables of gains and biases; more are made if a batch needs them.
_RANKS_PER_SLOT = 16
_MIN_SLOTS = 8


def gate_in(operators: ModuleOperators) -> Gate | None:
    """A module's gate, if the kernels serve it."""
    gate = operators.get(Gate)
    return gate if gate is not None and has_kernel(gate, "gpu") else None


def gates_of(operators: AdapterOperators) -> list[Gate]:
    """An adapter's gates in all modules that the kernels serve."""
    return [gate for ops in operators.modules.values() if (gate := gate_in(ops)) is not None]


def components_of(operators: AdapterOperators) -> tuple[int, ...]:
    """Each component's largest rank, which it occupies in every module; empty without gates."""
    ranks = [_ranks_of(gate) for gate in gates_of(operators)]
    return tuple(max(column) for column in zip(*ranks, strict=True))


def _ranks_of(gate: Gate) -> tuple[int, ...]:
    """Each component's rank in one module."""
    return tuple(end - start for start, end in pairwise(gate.rank_indptr))


def moves_of(components: Sequence[int], gate: Gate) -> list[tuple[slice, slice]]:
    """Source and target ranks of a module's components, with adjacent ranges merged."""
    moves: list[tuple[int, int, int]] = []
    targets = accumulate(components, initial=0)
    for target, (start, end) in zip(targets, pairwise(gate.rank_indptr), strict=False):
        if moves and moves[-1][1] == start and moves[-1][2] == target:
            moves[-1] = (moves[-1][0], end, target + end - start)
        elif end > start:
            moves.append((start, end, target + end - start))
    return [(slice(s, e), slice(to - (e - s), to)) for s, e, to in moves]


def grown(table: torch.Tensor, num_slots: int) -> torch.Tensor:
    """A larger table, ``[layers, slots, …]``, with the old content followed by zeros."""
    larger = table.new_zeros(table.shape[0], num_slots, *table.shape[2:])
    larger[:, : table.shape[1]] = table
    return larger


class GpuPackedProjection:
    """The matrices and tables of one fused projection kind (``qkv``, ``o``, …), all layers.

    Attributes:
        columns: The columns of each slice in a fused result.
        a: ``[layers, pack_rank, slices, in]``: an adapter's ranks are one run for all slices.
        b: Per slice ``[layers, pack_rank, out]``.
        layers: Per layer, its views of ``a`` and ``b``.
        slice_ranks: How many ranks every adapter has in every module, ``[layers, slots, slices]``
            int32.
        gain_delta: ``g − 1`` per slot, ``[layers, slots, sum(out)]`` fp32, or None (no gains yet).
        bias: ``[layers, slots, sum(out)]`` fp32, or None.
    """

    def __init__(
        self, layout: ProjectionLayout, name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.name = name
        self.slices = layout.projections[name]
        self.columns = layout.columns(name)
        self._layout = layout
        self._like = {"dtype": dtype, "device": device}
        self.gain_delta: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.reserve(0, 1)

    def reserve(self, ranks: int, num_slots: int) -> None:
        """Allocates empty matrices and tables for ``ranks`` and ``num_slots``, slot 0 included."""
        layers, count = self._layout.num_layers, len(self.slices)
        shape = (layers, ranks, count, self.slices[0].in_features)
        self.a = torch.zeros(shape, **self._like)
        self.b = [torch.zeros(layers, ranks, s.out_features, **self._like) for s in self.slices]
        self.layers = [(self.a[i], [b[i] for b in self.b]) for i in range(layers)]
        shape = (layers, num_slots, count)
        self.slice_ranks = torch.zeros(shape, dtype=torch.int32, device=self._like["device"])

    def move(self, moves: Iterable[tuple[int, int, int]]) -> None:
        """Move ranks down within the matrices.

        Args:
            moves: First rank and end, and the first rank from now on; no range moves up, and lower
                ones come first.
        """
        for start, end, first in moves:
            if first != start:
                for matrix in (self.a, *self.b):
                    # Copy first, because source and target may overlap.
                    matrix[:, first : first + end - start] = matrix[:, start:end].clone()

    def put(self, operators: AdapterOperators, place: Place, num_slots: int) -> None:
        """Copy an adapter's factors, gains and biases into a place; clears what that held."""
        found = self._cleared(operators, place, num_slots)
        for s, columns in enumerate(self.columns):
            own = [(layer, ops) for layer, of, ops in found if of == s]
            factors = [(i, ops.low_rank) for i, ops in own if ops.low_rank is not None]
            self._put_ranks(place.slot, s, ((i, low_rank.rank) for i, low_rank in factors))
            start = place.rank_start
            for layers, factor in by_layers((i, low_rank.a) for i, low_rank in factors):
                self.a[layers, start : start + factor.shape[1], s] = factor
            for layers, factor in by_layers((i, low_rank.b) for i, low_rank in factors):
                self.b[s][layers, start : start + factor.shape[1]] = factor
            for layers, gain in by_layers((i, ops.gain) for i, ops in own if ops.gain is not None):
                assert self.gain_delta is not None
                self.gain_delta[layers, place.slot, columns] = gain - 1.0
            for layers, bias in by_layers((i, ops.bias) for i, ops in own if ops.bias is not None):
                assert self.bias is not None
                self.bias[layers, place.slot, columns] = bias

    def put_gates(self, operators: AdapterOperators, place: Place, num_slots: int) -> None:
        """Copies the factors of an adapter's gates into a place that holds nothing else."""
        self._cleared(AdapterOperators({}), place, num_slots)
        found, components = self._layout.of(operators, self.name), components_of(operators)
        here = slice(place.rank_start, place.rank_end)
        for s, b in enumerate(self.b):
            gates = ((i, gate_in(ops)) for i, of, ops in found if of == s)
            own = [(i, gate) for i, gate in gates if gate is not None]
            # Every component covers as many ranks as the widest one; those past its own are zeros.
            self._put_ranks(place.slot, s, ((layer, max(_ranks_of(gate))) for layer, gate in own))
            for _, run in groupby(own, lambda at: at[1].rank_indptr):
                alike = list(run)
                moves = moves_of(components, alike[0][1])
                for layers, factor in by_layers((i, gate.a) for i, gate in alike):
                    for ranks, target in moves:
                        self.a[layers, here][:, target, s] = factor[:, ranks]
                for layers, factor in by_layers((i, gate.b) for i, gate in alike):
                    for ranks, target in moves:
                        b[layers, here][:, target] = factor[:, ranks]

    def _cleared(
        self, operators: AdapterOperators, place: Place, num_slots: int
    ) -> list[tuple[int, int, ModuleOperators]]:
        """Zeroes a place in tables that exist or are needed; returns the adapter's operators."""
        found = self._layout.of(operators, self.name)
        # A table that exists covers every slot: adapters without an entry must read zeros.
        if self.gain_delta is not None or any(ops.gain is not None for _, _, ops in found):
            self.gain_delta = self._widened(self.gain_delta, num_slots)
        if self.bias is not None or any(ops.bias is not None for _, _, ops in found):
            self.bias = self._widened(self.bias, num_slots)
        if self.slice_ranks.shape[1] < num_slots:
            self.slice_ranks = grown(self.slice_ranks, num_slots)
        for table in (self.gain_delta, self.bias, self.slice_ranks):
            if table is not None:
                table[:, place.slot] = 0
        for matrix in (self.a, *self.b) if place.rank_end > place.rank_start else ():
            matrix[:, place.rank_start : place.rank_end] = 0
        return found

    def _widened(self, table: torch.Tensor | None, num_slots: int) -> torch.Tensor:
        if table is None:
            shape = (self._layout.num_layers, 0, self._layout.width(self.name))
            table = torch.zeros(shape, device=self._like["device"])
        return table if table.shape[1] >= num_slots else grown(table, num_slots)

    def _put_ranks(self, slot: int, s: int, own: Iterable[tuple[int, int]]) -> None:
        """Records an adapter's ranks in a slice, by layer."""
        # Fill neighbouring layers of equal rank at once: the rank is a launch argument, so nothing
        # is uploaded.
        for (rank, _), run in groupby(enumerate(own), lambda at: (at[1][1], at[1][0] - at[0])):
            layers = [layer for _, (layer, _) in run]
            self.slice_ranks[layers[0] : layers[-1] + 1, slot, s].fill_(rank)

    def addresses(self) -> list[object]:
        """Addresses and shapes of the matrices."""
        return [(t.data_ptr(), t.shape) for t in (self.a, *self.b, self.slice_ranks)]

    def optional_addresses(self, form: Form) -> list[object]:
        """Addresses and shapes of the tables that steps of a form read."""
        tables = (
            self.gain_delta if (Gain, self.name) in form else None,
            self.bias if (Bias, self.name) in form else None,
        )
        return [None if t is None else (t.data_ptr(), t.shape) for t in tables]


class GpuPack(Part):
    """The matrices of all fused projections, and each adapter's place in them.

    An adapter owns the same rank range in every module, as wide as its own largest rank. What fits
    by its bytes fits: where free ranks are scattered, adapters move together within the matrices,
    whose addresses do not change. The components of a gated adapter lie behind each other in a
    place of their own. Idle adapters stay until their bytes or their slot are needed, because a
    step reads the ranks of its own adapters and no others.

    Args:
        layout: Shape of the base.
        dtype: Serving dtype.
        device: Where the matrices are.
        max_bytes: Budget.

    Attributes:
        projections: The matrices, by name.
    """

    def __init__(
        self, layout: ProjectionLayout, dtype: torch.dtype, device: torch.device, max_bytes: int
    ) -> None:
        self._layout = layout
        self.projections = {
            name: GpuPackedProjection(layout, name, dtype, device) for name in layout.projections
        }
        # Bytes that one rank takes over all modules.
        self._rank_bytes = dtype.itemsize * sum(
            layout.num_layers * (len(slices) * slices[0].in_features + layout.width(name))
            for name, slices in layout.projections.items()
        )
        self._forms: dict[str, Form] = {}
        ranks = max_bytes // self._rank_bytes // RANK_ALIGNMENT * RANK_ALIGNMENT
        self._placement = Placement(ranks, max(ranks // _RANKS_PER_SLOT, _MIN_SLOTS))
        for projection in self.projections.values():
            projection.reserve(ranks, self._placement.num_slots)

    @property
    def places(self) -> Mapping[str, Place]:
        """Each adapter's place, by key."""
        return self._placement.places

    @property
    def num_slots(self) -> int:
        """Slots of the tables."""
        return self._placement.num_slots

    def form(self, key: str) -> Form:
        """The packed kinds of operators that an adapter has, with their projections."""
        return self._forms[key]

    def gates(self, key: str) -> Place | None:
        """The place of an adapter's gate components: ranks and a slot of their own."""
        return self.places.get(_gates_of(key))

    def has_room(self, operators: AdapterOperators) -> bool:
        return self._placement.has_slots(2 if components_of(operators) else 1)

    def extra_bytes(self, operators: AdapterOperators) -> int:
        """Bytes of unused ranks: an adapter occupies the same number of ranks in every module."""
        widths = Placement.width_of(operators.rank), Placement.width_of(_sum_of(operators))
        held = sum(gate.a.nbytes + gate.b.nbytes for gate in gates_of(operators))
        return sum(widths) * self._rank_bytes - operators.num_low_rank_bytes - held

    def insert(self, key: str, operators: AdapterOperators) -> None:
        place = self._place(key, Placement.width_of(operators.rank))
        self._forms[key] = frozenset(
            (kind, name)
            for name in self._layout.projections
            for _, _, ops in self._layout.of(operators, name)
            for kind in (LowRank, Gain, Bias, Gate)
            if (gate_in(ops) if kind is Gate else ops.get(kind)) is not None
        )
        for projection in self.projections.values():
            projection.put(operators, place, self.num_slots)
        if components_of(operators):
            place = self._place(_gates_of(key), Placement.width_of(_sum_of(operators)))
            for projection in self.projections.values():
                projection.put_gates(operators, place, self.num_slots)

    def remove(self, key: str) -> None:
        self._placement.remove(key)
        self._placement.remove(_gates_of(key))
        self._forms.pop(key, None)

    def _place(self, key: str, width: int) -> Place:
        """A place of ``width`` ranks."""
        if not self._placement.has_room(width):
            moves = self._placement.compact()
            assert self._placement.has_room(width), "the store keeps to its budget"
            for projection in self.projections.values():
                projection.move(moves)
        return self._placement.put(key, width)


def _sum_of(operators: AdapterOperators) -> int:
    return sum(components_of(operators))


def _gates_of(key: str) -> str:
    """The key under which an adapter's gate components are placed."""
    return f"gates of {key}"
