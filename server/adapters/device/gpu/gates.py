"""Gated adapters (learned fusions, Arrow, X-LoRA) on the gpu path: each has a pack of its own.

To the kernels, the components of a fusion are members of a segment: the rows of a request that uses
it have the fusion's ranks in their mix, each component a slot, and between shrink and expand
``fusion_gate`` or ``routing_gate`` weighs them per row.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

import torch

from turret.kernels.adapters.segments import LongSegment, SegmentMember
from turret.kernels.gpu.adapters.fusion_gate import fusion_gate, routing_gate
from turret.kernels.gpu.adapters.segmented_expand import segmented_expand
from turret.kernels.gpu.adapters.segmented_shrink import segmented_shrink
from turret.kernels.gpu.tables.segment_table import SegmentTable
from turret.kernels.gpu.tables.staged_buffer import upload
from turret.kernels.rows.linear import linear_in_pieces
from turret.server.adapters.device.gpu.tables import GpuTables
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Members
from turret.server.adapters.device.part import Part
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.gate import Gate, GivenScore, PrototypeScore, QueryScore

_Place = tuple[int, str]  # layer, projection
_Score = TypeVar("_Score", QueryScore, PrototypeScore, GivenScore)
# Of every row of a step, for an adapter that a first pass tells them (``StepMembers.given``).
_GivenRows = torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Queries:
    """Scores by query and key; what a slice lacks is zero.

    Attributes:
        query: ``[slices · d_k, in]``.
        keys: ``[ranks, slices, d_k]`` fp32.
    """

    query: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def of(
        cls, slices: Mapping[int, Gate], bounds: tuple[tuple[int, int], ...], count: int
    ) -> _Queries:
        """Those of the gates by slice, of ``count`` slices."""
        scores = {s: (gate, _score(gate, QueryScore)) for s, gate in slices.items()}
        like = next(iter(scores.values()))[1]
        d_k = max(score.query.shape[0] for _, score in scores.values())
        query = like.query.new_zeros(count, d_k, like.query.shape[1])
        keys = like.keys.new_zeros(bounds[-1][1], count, d_k)
        for s, (gate, score) in scores.items():
            width = score.query.shape[0]
            query[s, :width] = score.query
            for (start, _), (first, end) in zip(bounds, pairwise(gate.rank_indptr), strict=True):
                keys[start : start + end - first, s, :width] = score.keys[first:end]
        return cls(query.flatten(0, 1), keys)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.query, self.keys)

    def gates(
        self,
        x: torch.Tensor,
        v: torch.Tensor,
        gated: torch.Tensor,
        table: SegmentTable,
        given: _GivenRows,
    ) -> torch.Tensor:
        _, slices, d_k = self.keys.shape
        q = linear_in_pieces(x, self.query).float().view(x.shape[0], slices, d_k)
        return fusion_gate(q, v, self.keys, gated, table)


@dataclass(frozen=True, slots=True)
class _Prototypes:
    """Scores by prototype: ``[slices · K, in]`` fp32, zero in slices without a gate."""

    prototypes: torch.Tensor
    top_k: int
    temperature: float

    @classmethod
    def of(cls, slices: Mapping[int, Gate], count: int) -> _Prototypes:
        """Those of the gates by slice, of ``count`` slices; one router has one ``top_k``."""
        scores = {s: _score(gate, PrototypeScore) for s, gate in slices.items()}
        like = next(iter(scores.values()))
        prototypes = like.prototypes.new_zeros(count, *like.prototypes.shape)
        for s, score in scores.items():
            assert (score.top_k, score.temperature) == (like.top_k, like.temperature)
            prototypes[s] = score.prototypes
        return cls(prototypes.flatten(0, 1), like.top_k, like.temperature)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.prototypes,)

    def gates(
        self,
        x: torch.Tensor,
        v: torch.Tensor,
        gated: torch.Tensor,
        table: SegmentTable,
        given: _GivenRows,
    ) -> torch.Tensor:
        similarities = linear_in_pieces(x.float(), self.prototypes)
        by_slot = similarities.view(x.shape[0], -1, gated.shape[0])
        return routing_gate(by_slot, gated, table, self.top_k, self.temperature)


@dataclass(frozen=True, slots=True)
class _Given:
    """Scores that a first pass has told: which of the router's modules each slice is.

    A slice without a gate has no ranks, so that it does not matter what it is told.
    """

    modules: tuple[int, ...]

    @classmethod
    def of(cls, slices: Mapping[int, Gate], count: int) -> _Given:
        """Those of the gates by slice, of ``count`` slices."""
        scores = {s: _score(gate, GivenScore) for s, gate in slices.items()}
        return cls(tuple(scores[s].module if s in scores else 0 for s in range(count)))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return ()

    def gates(
        self,
        x: torch.Tensor,
        v: torch.Tensor,
        gated: torch.Tensor,
        table: SegmentTable,
        given: _GivenRows,
    ) -> torch.Tensor:
        assert given is not None, "a first pass comes before the step"
        return torch.stack([given[:, module] for module in self.modules], dim=1)


@dataclass(frozen=True, slots=True)
class _GatedProjection:
    """A fusion in one fused projection of one layer; what a slice lacks is zero.

    Attributes:
        a: ``[ranks, slices, in]``.
        b: Per slice ``[ranks, out]``.
        score: What gates are computed from.
        slice_ranks: Ranks of each component in each slice, ``[K, slices]`` int32.
    """

    a: torch.Tensor
    b: tuple[torch.Tensor, ...]
    score: _Queries | _Prototypes | _Given
    slice_ranks: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that a launch reads of it."""
        return (self.a, *self.b, *self.score.tensors(), self.slice_ranks)

    def add(
        self,
        table: SegmentTable,
        gated: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        given: _GivenRows,
    ) -> None:
        """Add the gated updates of the table's rows to ``y``, in place."""
        v = segmented_shrink(x, self.a, self.slice_ranks, table)
        gates = self.score.gates(x, v, gated, table, given)
        segmented_expand(y, v, self.b, self.slice_ranks, table, gates=gates)


@dataclass(frozen=True, slots=True)
class _Fusion:
    """A gated adapter.

    Attributes:
        bounds: First rank and end of each component in the fusion's pack.
        gated: Ones, ``[K]`` int32: every slot of the pack belongs to the fusion.
        places: Where it has gates.
    """

    bounds: tuple[tuple[int, int], ...]
    gated: torch.Tensor
    places: dict[_Place, _GatedProjection]

    @property
    def ranks(self) -> int:
        return self.bounds[-1][1]

    def segment(self, start: int, end: int, weight: float) -> LongSegment:
        """Rows that use it."""
        members = (SegmentMember(*bound, k, weight) for k, bound in enumerate(self.bounds))
        return LongSegment(start, end, tuple(members))


@dataclass(frozen=True, slots=True)
class GpuStepGates:
    """A step's rows of every fusion.

    Attributes:
        runs: Fusions with the tables of their rows, and what a first pass has told them.
        signature: Names the fusions: the launches of a step. Steps that are told something are
            launched as they are.
    """

    runs: tuple[tuple[_Fusion, SegmentTable, _GivenRows], ...]
    signature: tuple[Hashable, ...]

    def changes(self, layer: int, projection: str) -> bool:
        """Whether a fusion of the step has gates there."""
        return any((layer, projection) in fusion.places for fusion, _, _ in self.runs)

    def apply(self, layer: int, projection: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of one layer's fused projection to ``y``, in place."""
        for fusion, table, given in self.runs:
            gated = fusion.places.get((layer, projection))
            if gated is not None:
                gated.add(table, fusion.gated, x, y, given)


class GpuGates(Part):
    """The gated adapters of the gpu path, by key."""

    def __init__(self, layout: ProjectionLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._layout = layout
        self._dtype, self._device = dtype, device
        self._fusions: dict[str, _Fusion] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        """Take up an adapter if it has gates; its tensors are on the device."""
        found: dict[_Place, dict[int, Gate]] = {}
        for projection in self._layout.projections:
            for layer, s, ops in self._layout.of(operators, projection):
                if ops.gate is not None:
                    found.setdefault((layer, projection), {})[s] = ops.gate
        if not found:
            return
        gates = [gate for slices in found.values() for gate in slices.values()]
        most = [max(ranks) for ranks in zip(*map(_ranks_of, gates), strict=True)]
        bounds = tuple(pairwise([0, *accumulate(most)]))
        slice_ranks = self._upload_ranks(found, len(bounds))
        self._fusions[key] = _Fusion(
            bounds,
            torch.ones(len(bounds), dtype=torch.int32, device=self._device),
            {
                place: self._gated(place[1], slices, bounds, ranks)
                for (place, slices), ranks in zip(found.items(), slice_ranks, strict=True)
            },
        )

    def remove(self, key: str) -> None:
        self._fusions.pop(key, None)

    def bind(
        self,
        runs: Sequence[tuple[int, int, Members]],
        tables: GpuTables,
        given: Mapping[str, torch.Tensor],
    ) -> GpuStepGates:
        """Load a step's tables.

        Args:
            runs: Runs of rows: first, end, and their mix.
            tables: Hold the segment tables.
            given: What first passes have told; see ``StepMembers``.
        """
        users: dict[str, list[LongSegment]] = {}
        for start, end, mix in runs:
            for key, weight in mix:
                fusion = self._fusions.get(key)
                if fusion is not None:
                    users.setdefault(key, []).append(fusion.segment(start, end, weight))
        bound = []
        # In an order of their own: what a row adds up must not depend on its batch mates.
        for key in sorted(users):
            fusion = self._fusions[key]
            table = tables.fusion_table(key, fusion.ranks, len(fusion.bounds))
            table.load(users[key])
            bound.append((fusion, table, given.get(key)))
        return GpuStepGates(tuple(bound), tuple(sorted(users)))

    def addresses(self) -> list[object]:
        """Where the tensors of every fusion are, and how large."""
        return [
            (
                (key, fusion.bounds, fusion.gated.data_ptr()),
                [
                    (place, [(t.data_ptr(), t.shape) for t in gated.tensors()])
                    for place, gated in fusion.places.items()
                ],
            )
            for key, fusion in sorted(self._fusions.items())
        ]

    def _upload_ranks(
        self, found: dict[_Place, dict[int, Gate]], num_components: int
    ) -> tuple[torch.Tensor, ...]:
        """``[K, slices]`` int32 per place, by one copy."""
        values, shapes = [], []
        for (_, projection), slices in found.items():
            count = len(self._layout.projections[projection])
            none = (0,) * num_components
            columns = [_ranks_of(slices[s]) if s in slices else none for s in range(count)]
            values += [rank for row in zip(*columns, strict=True) for rank in row]
            shapes.append((num_components, count))
        moved = upload(torch.tensor(values, dtype=torch.int32), self._device)
        parts = moved.split([rows * columns for rows, columns in shapes])
        # Copies: kernels want each at the start of an allocation.
        return tuple(p.clone().view(shape) for p, shape in zip(parts, shapes, strict=True))

    def _gated(
        self,
        projection: str,
        slices: dict[int, Gate],
        bounds: tuple[tuple[int, int], ...],
        slice_ranks: torch.Tensor,
    ) -> _GatedProjection:
        shapes, ranks = self._layout.projections[projection], bounds[-1][1]
        like = {"dtype": self._dtype, "device": self._device}
        a = torch.zeros(ranks, len(shapes), shapes[0].in_features, **like)
        b = tuple(torch.zeros(ranks, shape.out_features, **like) for shape in shapes)
        for s, gate in slices.items():
            for (start, _), (first, end) in zip(bounds, pairwise(gate.rank_indptr), strict=True):
                place = slice(start, start + end - first)
                a[place, s] = gate.a[first:end]
                b[s][place] = gate.b[first:end]
        score = _scores_of(slices, bounds, len(shapes))
        return _GatedProjection(a, b, score, slice_ranks)


def _scores_of(
    slices: Mapping[int, Gate], bounds: tuple[tuple[int, int], ...], count: int
) -> _Queries | _Prototypes | _Given:
    """What the gates by slice, of ``count`` slices, are computed from."""
    kind = type(next(iter(slices.values())).score)
    if kind is PrototypeScore:
        return _Prototypes.of(slices, count)
    if kind is GivenScore:
        return _Given.of(slices, count)
    return _Queries.of(slices, bounds, count)


def _ranks_of(gate: Gate) -> tuple[int, ...]:
    return tuple(end - start for start, end in pairwise(gate.rank_indptr))


def _score(gate: Gate, kind: type[_Score]) -> _Score:
    assert isinstance(gate.score, kind), "an adapter has gates of one kind"
    return gate.score
