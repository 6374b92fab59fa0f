"""Learned fusions on the gpu path, whose components are members of the pack.

For the kernels, the components of a gated adapter are members of a mix like any other, so that the
step's own shrink and expand include them. Between the two, two launches compute their weights per
row, for all gated adapters of the step together (``kernels/gpu/fusion_gate.py``). Gates with other
scores (Arrow, X-LoRA) are left to their operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from turret.server.adapters.device.gpu.pack import (
    GpuPack,
    PackPlace,
    StepForm,
    components_of,
    gate_in,
    gates_of,
    moves_of,
)
from turret.server.adapters.device.gpu.uploads import aligned, apart
from turret.server.adapters.device.store import Members, Part, ProjectionLayout
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.gate import Gate


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
            x: Its input.
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
        """An adapter's words in a projection, ``[layers, slices, WORDS]`` in one row.

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
