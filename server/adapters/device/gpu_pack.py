"""Low-rank updates side by side in wide matrices; gains and biases in tables.

The matrices and tables are the *pack*. An adapter's *place* in the pack is a range of ranks, the
same in every matrix, and a *slot*, which is its index in every table. Slot 0 belongs to no adapter,
and stays neutral. Matrices and tables are made once, as large as their budget, and never move,
because captured steps contain their addresses.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, pairwise

import torch

from turret.kernels.gpu.fusion_gate import WORDS, fusion_gate, gate_shrink
from turret.kernels.gpu.tables import (
    GatedMembers,
    RunOfRows,
    SegmentMember,
    SegmentTable,
    host_tensor,
    upload,
)
from turret.server.adapters.device import Members, Part, ProjectionLayout, has_kernel
from turret.server.adapters.device.gpu_uploads import aligned, apart, by_layers
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.gate import Gate
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.vectors import Gain

# The form of a step, which determines its launches: a set of pairs (kind of packed operator,
# projection) and of pairs (slot table, position in a mix). A step can run in any form that contains
# its own, because the additional kernels find empty tables.
StepForm = frozenset[tuple[Hashable, Hashable]]

# The kinds of packed operators in a form. A bias counts as a gain: the kernel looks up both or
# neither, so that fewer variants are compiled.
PACKED = (LowRank, Gain, Gate)

# Every adapter's ranks start at a multiple of this.
RANK_ALIGNMENT = 8


@dataclass(slots=True)
class PackPlace:
    """Ranks ``[rank_start, rank_end)`` of every matrix, and a slot of every table."""

    rank_start: int
    rank_end: int
    slot: int


class Placement:
    """Gives places to adapters, by key.

    Args:
        capacity: The number of ranks that all places together may take.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._places: dict[str, PackPlace] = {}

    @property
    def places(self) -> Mapping[str, PackPlace]:
        return self._places

    @staticmethod
    def width_of(rank: int) -> int:
        """Number of ranks that an adapter with this largest rank occupies."""
        return -(-rank // RANK_ALIGNMENT) * RANK_ALIGNMENT

    def has_room(self, width: int) -> bool:
        """Whether ``width`` ranks are free side by side."""
        return self._find(width) is not None

    def put(self, key: str, width: int) -> PackPlace:
        """Places an adapter in the first gap that is large enough. The caller has made room."""
        start = self._find(width)
        assert start is not None, "the pack makes room before an adapter is placed"
        place = self._places[key] = PackPlace(start, start + width, self._find_slot())
        return place

    def remove(self, key: str) -> None:
        self._places.pop(key, None)

    def compact(self) -> list[tuple[int, int, int]]:
        """Bring all adapters together at the front.

        Returns:
            The moves: first rank, end, and new first rank of each adapter. No adapter moves to
            higher ranks. If the moves are made in this order within the same matrices, none
            overwrites the source of a later one.
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
        return next(i for i in range(1, len(taken) + 2) if i not in taken)


# An adapter is charged for at least this many ranks, to pay for its slot, which takes rows in the
# tables of gains and biases.
_RANKS_PER_SLOT = 16


def padded(num_slots: int, slot_bytes: int) -> int:
    """The number of slots, rounded up so that they fill whole units of 16 bytes.

    For an address that 16 does not divide, Triton would compile another variant of a kernel.
    """
    return num_slots + -num_slots % (16 // slot_bytes)


def gate_in(operators: ModuleOperators) -> Gate | None:
    """A module's gate, if the kernels serve it."""
    gate = operators.get(Gate)
    return gate if gate is not None and has_kernel(gate, "gpu") else None


def gates_of(operators: AdapterOperators) -> list[Gate]:
    """An adapter's gates in all modules that the kernels serve."""
    return [gate for ops in operators.modules.values() if (gate := gate_in(ops)) is not None]


def components_of(operators: AdapterOperators) -> tuple[int, ...]:
    """Each component's largest rank, which is reserved in every module; empty without gates."""
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


class GpuPackedProjection:
    """The matrices and tables of one fused projection kind (``qkv``, ``o``, …), all layers.

    Attributes:
        columns: The columns of each slice in a fused result.
        a: ``[layers, pack_rank, slices, in]``: an adapter's ranks are one run for all slices.
        b: Per slice ``[layers, pack_rank, out]``.
        layers: Per layer, its views of ``a`` and ``b``.
        slice_ranks: Every adapter's number of ranks in every module, ``[layers, slots, slices]``
            int32.
        gain_delta: ``g − 1`` per slot, ``[layers, slots, sum(out)]`` fp32.
        bias: ``[layers, slots, sum(out)]`` fp32.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        ranks: int,
        num_slots: int,
    ) -> None:
        self.name = name
        self.slices = layout.projections[name]
        self.columns = layout.columns(name)
        self._layout = layout
        layers, count = layout.num_layers, len(self.slices)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(layers, *shape, dtype=dtype, device=device)

        self.a = zeros(ranks, count, self.slices[0].in_features, dtype=dtype)
        self.b = [zeros(ranks, s.out_features, dtype=dtype) for s in self.slices]
        self.layers = [(self.a[i], [b[i] for b in self.b]) for i in range(layers)]
        ranks_of_slots = zeros(padded(num_slots, 4), count, dtype=torch.int32)
        self.slice_ranks = ranks_of_slots[:, :num_slots]
        self.gain_delta, self.bias = (zeros(num_slots, layout.width(name)) for _ in range(2))

    def move(self, moves: Iterable[tuple[int, int, int]]) -> None:
        """Move ranges of ranks to lower ranks within the matrices.

        Args:
            moves: First rank, end, and new first rank of each range, in ascending order. No range
                moves to higher ranks.
        """
        for start, end, first in moves:
            if first != start:
                for matrix in (self.a, *self.b):
                    # Copy first, because source and target may overlap.
                    matrix[:, first : first + end - start] = matrix[:, start:end].clone()

    def put(self, operators: AdapterOperators, place: PackPlace) -> None:
        """Copy an adapter's factors, gains and biases into a place, which is cleared first."""
        self._clear(place)
        found = self._layout.of(operators, self.name)
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
                self.gain_delta[layers, place.slot, columns] = gain - 1.0
            for layers, bias in by_layers((i, ops.bias) for i, ops in own if ops.bias is not None):
                self.bias[layers, place.slot, columns] = bias

    def put_gates(self, operators: AdapterOperators, place: PackPlace) -> None:
        """Copies the factors of an adapter's gates into a place that holds nothing else."""
        self._clear(place)
        found, components = self._layout.of(operators, self.name), components_of(operators)
        here = slice(place.rank_start, place.rank_end)
        for s, b in enumerate(self.b):
            gates = ((i, gate_in(ops)) for i, of, ops in found if of == s)
            own = [(i, gate) for i, gate in gates if gate is not None]
            # A slot has one number of ranks per slice, so every component counts as having as many
            # as the widest one; those past its own are zeros.
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

    def _clear(self, place: PackPlace) -> None:
        for table in (self.gain_delta, self.bias, self.slice_ranks):
            table[:, place.slot] = 0
        for matrix in (self.a, *self.b) if place.rank_end > place.rank_start else ():
            matrix[:, place.rank_start : place.rank_end] = 0

    def _put_ranks(self, slot: int, s: int, own: Iterable[tuple[int, int]]) -> None:
        """Records an adapter's ranks in a slice, by layer."""
        # Fill neighbouring layers of equal rank at once. The rank is an argument of the launch, so
        # nothing has to be uploaded.
        for (rank, _), run in groupby(enumerate(own), lambda at: (at[1][1], at[1][0] - at[0])):
            layers = [layer for _, (layer, _) in run]
            self.slice_ranks[layers[0] : layers[-1] + 1, slot, s].fill_(rank)


class GpuPack(Part):
    """The matrices of all fused projections, and each adapter's place in them.

    An adapter owns the same rank range in every module, as wide as its own largest rank. An adapter
    for which there are enough bytes always fits: if the free ranks are scattered, adapters are
    moved together within the matrices, whose addresses do not change. The components of a gated
    adapter are side by side in a separate place. Idle adapters stay until their bytes or their slot
    are needed, because a step reads only the ranks of its own adapters.

    Args:
        layout: Shape of the base.
        dtype: Serving dtype.
        device: The device of the matrices.
        max_bytes: The maximum size of all matrices and tables, including those of gates.

    Attributes:
        projections: The matrices, by name.
        num_slots: Slots of the tables, the neutral slot 0 included.
        budget: Bytes that adapters may take; see ``bytes_of``.
        num_bytes: Bytes of all matrices and tables.
    """

    def __init__(
        self, layout: ProjectionLayout, dtype: torch.dtype, device: torch.device, max_bytes: int
    ) -> None:
        self._layout = layout
        # Bytes that one rank takes over all modules.
        self._rank_bytes = dtype.itemsize * sum(
            layout.num_layers * (len(slices) * slices[0].in_features + layout.width(name))
            for name, slices in layout.projections.items()
        )
        slot_bytes = sum(
            layout.num_layers * (8 * layout.width(name) + (4 + 8 * WORDS) * len(slices))
            for name, slices in layout.projections.items()
        )
        # Bytes that an adapter takes for each of its ranks, its share of the tables included.
        self._share = self._rank_bytes + -(-slot_bytes // _RANKS_PER_SLOT)
        count = max(max_bytes - slot_bytes, 0) // (self._share * _RANKS_PER_SLOT)
        ranks = count * _RANKS_PER_SLOT
        self.num_slots = count + 1
        self.budget = ranks * self._share
        modules = layout.num_layers * sum(map(len, layout.projections.values()))
        padding = 4 * modules * (padded(self.num_slots, 4) - self.num_slots)
        self.num_bytes = ranks * self._rank_bytes + self.num_slots * slot_bytes + padding
        self._forms: dict[str, StepForm] = {}
        self._placement = Placement(ranks)
        self.projections = {
            name: GpuPackedProjection(layout, name, dtype, device, ranks, self.num_slots)
            for name in layout.projections
        }

    @property
    def places(self) -> Mapping[str, PackPlace]:
        """The place of each adapter, by key."""
        return self._placement.places

    def form(self, key: str) -> StepForm:
        """The form of an adapter's packed operators."""
        return self._forms[key]

    def gates(self, key: str) -> PackPlace | None:
        """The place of an adapter's gate components: ranks and a slot of their own."""
        return self.places.get(_gates_of(key))

    def bytes_of(self, operators: AdapterOperators) -> int:
        """Bytes that an adapter takes in the pack, with the same ranks reserved in every module."""
        widths = [Placement.width_of(operators.rank)]
        if components_of(operators):
            widths.append(Placement.width_of(_sum_of(operators)))
        return sum(max(width, _RANKS_PER_SLOT) for width in widths) * self._share

    def extra_bytes(self, operators: AdapterOperators) -> int:
        held = operators.num_low_rank_bytes
        held += sum(gate.a.nbytes + gate.b.nbytes for gate in gates_of(operators))
        for module in operators.modules.values():
            held += sum(t.nbytes for t in (module.gain, module.bias) if t is not None)
        return self.bytes_of(operators) - held

    def insert(self, key: str, operators: AdapterOperators) -> None:
        place = self._place(key, Placement.width_of(operators.rank))
        self._forms[key] = frozenset(
            (kind, name)
            for name in self._layout.projections
            for _, _, ops in self._layout.of(operators, name)
            for kind in PACKED
            if (gate_in(ops) if kind is Gate else ops.get(kind)) is not None
            or (kind is Gain and ops.bias is not None)
        )
        for projection in self.projections.values():
            projection.put(operators, place)
        if components_of(operators):
            place = self._place(_gates_of(key), Placement.width_of(_sum_of(operators)))
            for projection in self.projections.values():
                projection.put_gates(operators, place)

    def remove(self, key: str) -> None:
        self._placement.remove(key)
        self._placement.remove(_gates_of(key))
        self._forms.pop(key, None)

    def _place(self, key: str, width: int) -> PackPlace:
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


# Learned fusions on the gpu path, whose components are members of the pack.
#
# For the kernels, the components of a gated adapter are members of a mix like any other, so that
# the step's own shrink and expand include them. Between shrink and expand, two launches compute the
# components' weights per row, for all gated adapters of the step together
# (``kernels/gpu/fusion_gate.py``). Gates with other scores (Arrow, X-LoRA) use ``Gate.add``.


@dataclass(frozen=True, slots=True)
class _Gated:
    """A gated adapter.

    Attributes:
        bounds: First rank and end of each component, relative to the adapter's first rank.
        query_length: Length of the longest query.
        kept: Queries and keys. Keeping them keeps the addresses in the tables valid.
    """

    bounds: tuple[tuple[int, int], ...]
    query_length: int
    kept: list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class GpuStepGates:
    """The gates of a step.

    Attributes:
        tables: The table with the addresses of queries and keys, for each projection in which an
            adapter of the step has gates.
    """

    tables: Mapping[str, torch.Tensor]

    def addresses(self) -> list[object]:
        """Addresses and shapes of the tables."""
        return [(name, t.data_ptr(), t.shape) for name, t in sorted(self.tables.items())]

    def of(
        self, layer: int, projection: str, x: torch.Tensor, v: torch.Tensor, table: SegmentTable
    ) -> torch.Tensor | None:
        """The component weights for ``segmented_expand``, if some components are gated.

        Args:
            layer: Layer number.
            projection: Fused projection.
            x: The projection's input.
            v: The rank activations from the step's shrink.
            table: The step's segments.
        """
        if projection not in self.tables:
            return None
        words = self.tables[projection][layer]
        q = gate_shrink(x, words, table)
        return fusion_gate(q, v, words, table, x.shape[0])


class GpuGates(Part):
    """The gated adapters of the gpu path, by key.

    Queries and keys differ in length from adapter to adapter, so each adapter has its own memory
    for them. Tables, indexed by the pack's slots, contain the addresses. A step's launches
    therefore do not depend on its adapters, and captured graphs stay valid when adapters enter and
    leave.

    Args:
        layout: Shape of the base.
        pack: The pack with the components' factors; an adapter enters it first.
        device: Where the kernels run.
    """

    def __init__(self, layout: ProjectionLayout, pack: GpuPack, device: torch.device) -> None:
        self._layout = layout
        self._pack = pack
        self._device = device
        self._gated: dict[str, _Gated] = {}
        # Projection → ``[layers, slots, slices, WORDS]`` int64; see ``fusion_gate.py``.
        self._tables: dict[str, torch.Tensor] = {}
        for name, slices in layout.projections.items():
            shape = (layout.num_layers, pack.num_slots, len(slices), WORDS)
            self._tables[name] = torch.zeros(shape, dtype=torch.int64, device=device)

    def insert(self, key: str, operators: AdapterOperators) -> None:
        place = self._pack.gates(key)
        if place is None:
            return
        components, kept = components_of(operators), list[torch.Tensor]()
        words = dict[str, list[int]]()
        for name in self._layout.projections:
            found = [
                (s, layer, gate)
                for layer, s, ops in self._layout.of(operators, name)
                if (gate := gate_in(ops)) is not None
            ]
            words[name] = self._words(name, found, components, kept)
        flat = host_tensor([*chain(*words.values())], torch.int64)
        parts = upload(flat, self._device).split([len(part) for part in words.values()])
        for name, part in zip(words, parts, strict=True):
            table = self._tables[name]
            table[:, place.slot] = part.view(table.shape[0], *table.shape[2:])
        query_length = max(len(gate.score.tensors()[0]) for gate in gates_of(operators))
        bounds = tuple(pairwise(accumulate(components, initial=0)))
        self._gated[key] = _Gated(bounds, query_length, kept)

    def remove(self, key: str) -> None:
        self._gated.pop(key, None)

    def extra_bytes(self, operators: AdapterOperators) -> int:
        """Additional bytes of the keys on the device, where the pack pads their ranks."""
        ranks, more = sum(components_of(operators)), 0
        for gate in gates_of(operators):
            query, keys = gate.score.tensors()
            padded = ranks * keys.shape[1] * keys.itemsize
            more += aligned(padded) + aligned(query.nbytes) - keys.nbytes - query.nbytes
        return more

    def bind(
        self, runs: Sequence[tuple[int, int, Members]], form: StepForm
    ) -> tuple[list[RunOfRows], GpuStepGates]:
        """The segments of a step, and its gates.

        Args:
            runs: Runs of rows, one for each sequence: first row, end, and mix.
            form: The kinds of kernels that the step launches.
        """
        segments = [RunOfRows(start, end, *self._members(mix)) for start, end, mix in runs]
        tables = {name: table for name, table in self._tables.items() if (Gate, name) in form}
        return segments, GpuStepGates(tables)

    def _members(self, mix: Members) -> tuple[tuple[SegmentMember, ...], tuple[GatedMembers, ...]]:
        """A mix's members in the request's order, and those that are gated."""
        members: list[SegmentMember] = []
        found: list[GatedMembers] = []
        for key, weight in mix:
            members.append(_member(self._pack.places[key], weight))
            adapter, place = self._gated.get(key), self._pack.gates(key)
            if adapter is None or place is None:
                continue
            begin, first = len(members), place.rank_start
            members += [
                SegmentMember(first + low, first + high, place.slot, weight)
                for low, high in adapter.bounds
            ]
            found.append(GatedMembers(begin, len(members), adapter.query_length))
        return tuple(members), tuple(found)

    def _words(
        self,
        name: str,
        found: Iterable[tuple[int, int, Gate]],
        components: Sequence[int],
        kept: list[torch.Tensor],
    ) -> list[int]:
        """An adapter's words in a projection, ``[layers, slices, WORDS]``, flattened.

        Args:
            name: The projection.
            found: Slice, layer and gate.
            components: Ranks of each component in the pack.
            kept: Receives the tensors to which the words point.
        """
        count = len(self._layout.projections[name])
        words = [[[0] * WORDS for _ in range(count)] for _ in range(self._layout.num_layers)]
        by_slice = sorted(found, key=lambda at: at[:2])
        for (s, _), run in groupby(by_slice, lambda at: (at[0], _form(at[2]))):
            alike = [(layer, gate) for _, layer, gate in run]
            moves = moves_of(components, alike[0][1])

            def in_pack_order(
                keys: torch.Tensor, moves: Sequence[tuple[slice, slice]] = moves
            ) -> torch.Tensor:
                """The keys, at their components' ranks in the pack."""
                own = keys.new_zeros(len(keys), sum(components), keys.shape[2])
                for ranks, target in moves:
                    own[:, target] = keys[:, ranks]
                return own

            tensors = [(layer, gate.score.tensors()) for layer, gate in alike]
            queries = apart(((layer, query) for layer, (query, _) in tensors), kept, self._device)
            own_keys = ((layer, keys) for layer, (_, keys) in tensors)
            keys = apart(own_keys, kept, self._device, in_pack_order)
            for (layer, (query, _)), q, k in zip(tensors, queries, keys, strict=True):
                words[layer][s] = [q, k, len(query), 0]
        return [word for layer in words for own in layer for word in own]


def _member(place: PackPlace, weight: float) -> SegmentMember:
    return SegmentMember(place.rank_start, place.rank_end, place.slot, weight)


def _form(gate: Gate) -> tuple[object, ...]:
    """The properties that gates must share to be copied together."""
    return gate.rank_indptr, *(t.shape for t in gate.score.tensors())
