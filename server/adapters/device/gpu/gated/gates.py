"""Gated adapters (learned fusions, Arrow, X-LoRA) on the gpu path: members of the one pack.

To the kernels, the components of a gated adapter are members of a mix like any other, so that the
step's own shrink and expand take them along. Between the two, two launches weigh them per row, for
all gated adapters of the step together: ``gate_shrink`` and ``fusion_gate``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from turret.kernels.adapters.segments import GatedMembers, LongSegment, SegmentMember
from turret.kernels.gpu.gates.fusion_gate import fusion_gate
from turret.kernels.gpu.gates.gate_shrink import gate_shrink
from turret.kernels.gpu.tables.segment_table import SegmentTable
from turret.server.adapters.device.gpu.gated.components import (
    bounds_of,
    components_of,
    gates_of,
)
from turret.server.adapters.device.gpu.gated.scores import ScoreTables
from turret.server.adapters.device.gpu.pack import GpuPack
from turret.server.adapters.device.gpu.placement import Place
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Members
from turret.server.adapters.device.part import Part
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.gate import Gate, GivenScore, PrototypeScore, QueryScore


@dataclass(frozen=True, slots=True)
class _Gated:
    """A gated adapter.

    Attributes:
        bounds: First rank and end of each component, from the adapter's first rank on.
        asked: Queries or prototypes in a module at most.
        is_told: Whether a first pass computes its gates.
        projections: Projections in which it has gates, in any layer.
    """

    bounds: tuple[tuple[int, int], ...]
    asked: int
    is_told: bool
    projections: frozenset[str]


@dataclass(frozen=True, slots=True)
class GpuStepGates:
    """The gates of a step.

    Attributes:
        tables: Per projection in which an adapter of the step has gates, the table of all scores.
        told: Scalings that first passes computed, flat, or None. Steps with them are not captured.
    """

    tables: Mapping[str, torch.Tensor]
    told: torch.Tensor | None = None

    @property
    def signature(self) -> Hashable:
        """Identifies a step's launches and the addresses they read, but not its adapters."""
        tables = self.tables.items()
        return tuple((name, table.data_ptr(), table.shape) for name, table in tables)

    def of(
        self, layer: int, projection: str, x: torch.Tensor, v: torch.Tensor, table: SegmentTable
    ) -> torch.Tensor | None:
        """The component weights for ``segmented_expand``, if some are gated.

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
        asked = gate_shrink(x, words, table)
        return fusion_gate(asked, v, words, table, x.shape[0], self.told)


class GpuGates(Part):
    """The gated adapters of the gpu path, by key.

    Args:
        layout: Shape of the base.
        pack: Holds their components' factors; an adapter enters it first.
        device: Where the kernels run.
    """

    def __init__(self, layout: ProjectionLayout, pack: GpuPack, device: torch.device) -> None:
        self._layout = layout
        self._pack = pack
        self._scores = ScoreTables(layout, device)
        self._gated: dict[str, _Gated] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        place = self._pack.gates(key)
        if place is None:
            return
        self._scores.put(key, operators, place.slot, self._pack.num_slots)
        scores = [gate.score for gate in gates_of(operators)]
        self._gated[key] = _Gated(
            bounds=tuple(bounds_of(components_of(operators))),
            asked=max(map(_asked, scores)),
            is_told=any(isinstance(score, GivenScore) for score in scores),
            projections=frozenset(
                name
                for name in self._layout.projections
                if any(ops.get(Gate) is not None for _, _, ops in self._layout.of(operators, name))
            ),
        )

    def remove(self, key: str) -> None:
        self._gated.pop(key, None)
        self._scores.remove(key)

    def extra_bytes(self, operators: AdapterOperators) -> int:
        """Bytes of keys beyond those in host memory: the pack's ranks determine their layout."""
        ranks, more = sum(components_of(operators)), 0
        for gate in gates_of(operators):
            if isinstance(gate.score, QueryScore):
                held, d_k = gate.score.keys.shape
                more += (ranks - held) * d_k * gate.score.keys.itemsize
        return more

    def bind(
        self,
        runs: Sequence[tuple[int, int, Members]],
        given: Mapping[str, torch.Tensor],
    ) -> tuple[list[LongSegment], GpuStepGates]:
        """The segments of a step, and its gates.

        Args:
            runs: Runs of rows: first, end, and their mix.
            given: Scalings that first passes computed; see ``StepMembers``.
        """
        used = {key for _, _, mix in runs for key, _ in mix} & self._gated.keys()
        told: dict[str, int] = {}
        size = 0
        for key in sorted(used):
            if self._gated[key].is_told:
                assert key in given, "a first pass comes before the step"
                told[key] = size
                size += given[key].numel()
        places, segments = self._pack.places, []
        for start, end, mix in runs:
            if used.isdisjoint(key for key, _ in mix):
                members = tuple(_members_of(mix, places))
                segments.append(LongSegment(start, end, members))
            else:
                segments.append(LongSegment(start, end, *self._members(mix, told, given)))
        names = sorted({name for key in used for name in self._gated[key].projections})
        flat = [given[key].reshape(-1) for key in told]
        joined = torch.cat(flat) if len(flat) > 1 else next(iter(flat), None)
        return segments, GpuStepGates({name: self._scores.tables[name] for name in names}, joined)

    def _members(
        self,
        mix: Members,
        told: Mapping[str, int],
        given: Mapping[str, torch.Tensor],
    ) -> tuple[tuple[SegmentMember, ...], tuple[GatedMembers, ...]]:
        """A mix's members in the request's order, and those that are gated."""
        members: list[SegmentMember] = []
        found: list[GatedMembers] = []
        for key, weight in mix:
            members += _members_of(((key, weight),), self._pack.places)
            adapter, place = self._gated.get(key), self._pack.gates(key)
            if adapter is None or place is None:
                continue
            begin, first = len(members), place.rank_start
            members += [
                SegmentMember(first + low, first + high, place.slot, weight)
                for low, high in adapter.bounds
            ]
            stride = given[key][0].numel() if key in told else 0
            where = told.get(key, 0), stride
            found.append(GatedMembers(begin, len(members), adapter.asked, *where))
        return tuple(members), tuple(found)


def _members_of(mix: Members, places: Mapping[str, Place]) -> list[SegmentMember]:
    """The places of a mix's adapters and their weights, in the request's order."""
    found = ((places[key], weight) for key, weight in mix)
    return [SegmentMember(p.rank_start, p.rank_end, p.slot, weight) for p, weight in found]


def _asked(score: QueryScore | PrototypeScore | GivenScore) -> int:
    """Number of vectors that a gate's scores start from."""
    if isinstance(score, GivenScore):
        return 0
    return len(score.query if isinstance(score, QueryScore) else score.prototypes)
