"""Gated low-rank updates (learned fusion, Arrow, X-LoRA): rows go through shrink, gate and expand.

A gate does not stack with other adapters: its weights are those of its own components.
So every adapter keeps matrices of its own, and the rows of a step are gathered by adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from turret.kernels.adapters.fusion_gate import (
    GATE_MULTIPLE,
    fusion_gate_reference,
    routing_gate_reference,
)
from turret.kernels.rows.linear import max_reduction, row_addmm_, row_linear
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Rows, StepMembers
from turret.server.adapters.device.part import Part
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.gate import Gate, GivenScore, PrototypeScore


@dataclass(frozen=True, slots=True)
class _GatedSlice:
    """One module of a fused projection: its gate and the columns it has in ``x downᵀ`` and ``y``.

    ``asked`` are the columns of its query, or those of its prototypes in ``x prototypesᵀ``, if it
    has either.
    ``component_of_rank`` is ``[ranks]`` int64. A rank that belongs to no component counts as the
    first one's; its activation is 0.
    """

    gate: Gate
    ranks: slice
    asked: slice
    columns: slice
    component_of_rank: torch.Tensor

    def add(
        self,
        v: torch.Tensor,
        similarities: torch.Tensor | None,
        given: torch.Tensor | None,
        weights: torch.Tensor | float,
        y: torch.Tensor,
    ) -> None:
        """``y += weight · Σ_k α_k b_kᵀ v_k`` in place, ``v = x downᵀ``."""
        ranks = v[:, self.ranks]
        gates = self._gates(v, similarities, given)
        scale = (gates * weights).index_select(1, self.component_of_rank)
        scaled = (ranks * scale).to(v.dtype)
        size = max_reduction(v.dtype)
        for start in range(0, scaled.shape[1], size):
            window = slice(start, start + size)
            part = scaled[:, window].contiguous()
            row_addmm_(y[:, self.columns], part, self.gate.b[window])

    def _gates(
        self, v: torch.Tensor, similarities: torch.Tensor | None, given: torch.Tensor | None
    ) -> torch.Tensor:
        """``α``, ``[rows, K]`` fp32."""
        score, indptr = self.gate.score, self.gate.rank_indptr
        if isinstance(score, GivenScore):
            assert given is not None, "a first pass has told them"
            return given[:, score.module]
        if isinstance(score, PrototypeScore):
            assert similarities is not None, "the projection has prototypes"
            mine = similarities[:, self.asked]
            return routing_gate_reference(mine, score.top_k, score.temperature)
        return fusion_gate_reference(v[:, self.asked], v[:, self.ranks], score.keys, indptr)


@dataclass(frozen=True, slots=True)
class _GatedProjection:
    """An adapter in one fused projection of one layer.

    ``down`` is ``[Σ (ranks + d_k), in_features]``: per slice, the factors ``a`` and the query if it
    has one. ``prototypes`` are those of all slices, ``[Σ K, in_features]`` fp32, or None.
    """

    down: torch.Tensor
    prototypes: torch.Tensor | None
    slices: tuple[_GatedSlice, ...]

    def apply(
        self, rows: Rows, given: torch.Tensor | None, x: torch.Tensor, y: torch.Tensor
    ) -> None:
        """Add its rows' updates to ``y``; ``given`` are the scalings of all rows, if it has any."""
        taken = rows.take(x)
        v = row_linear(taken, self.down)
        similarities = None
        if self.prototypes is not None:
            similarities = row_linear(taken.float(), self.prototypes)
        part = rows.take(y)
        told = None if given is None else rows.take(given)
        for gated in self.slices:
            gated.add(v, similarities, told, rows.weights, part)
        rows.put(y, part)


_Place = tuple[int, str]  # layer, projection
_Run = tuple[dict[_Place, _GatedProjection], Rows, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class StepGates:
    """A step's rows of every gated adapter, position by position in their mixes."""

    runs: Sequence[_Run]

    def apply(self, layer: int, projection: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of one layer's fused projection to ``y``, in place."""
        for places, rows, given in self.runs:
            gated = places.get((layer, projection))
            if gated is not None:
                gated.apply(rows, given, x, y)


class Gates(Part):
    """The gated adapters of the torch and cpu paths, by key."""

    def __init__(self, layout: ProjectionLayout, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self._adapters: dict[str, dict[_Place, _GatedProjection]] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        """Take up an adapter if it has gates."""
        found: dict[_Place, list[tuple[int, Gate]]] = {}
        for projection in self._layout.projections:
            for layer, s, ops in self._layout.of(operators, projection):
                if ops.gate is not None:
                    found.setdefault((layer, projection), []).append((s, ops.gate))
        if found:
            self._adapters[key] = {
                place: self._gated(place[1], gates) for place, gates in found.items()
            }

    def remove(self, key: str) -> None:
        self._adapters.pop(key, None)

    def bind(self, members: StepMembers) -> StepGates | None:
        """The step's rows, or None if no row has a gate."""
        runs = [
            *self._short_runs(members),
            *(
                (
                    self._adapters[key],
                    Rows(slice(start, end), 0, weight),
                    members.given.get(key),
                )
                for start, end, mix in members.long
                for key, weight in mix
                if key in self._adapters
            ),
        ]
        return StepGates(runs) if runs else None

    def _short_runs(self, members: StepMembers) -> list[_Run]:
        runs: list[_Run] = []
        gated = [[member for member in mix if member[0] in self._adapters] for mix in members.short]
        for j in range(max((len(mix) for mix in gated), default=0)):
            by_key: dict[str, list[tuple[int, float]]] = {}
            for row, mix in enumerate(gated):
                if len(mix) > j:
                    by_key.setdefault(mix[j][0], []).append((row, mix[j][1]))
            for key, found in by_key.items():
                rows = torch.tensor([row for row, _ in found], device=self._device)
                weights = torch.tensor([[weight] for _, weight in found], device=self._device)
                found_rows = Rows(rows, 0, weights)
                runs.append((self._adapters[key], found_rows, members.given.get(key)))
        return runs

    def _gated(self, projection: str, gates: Sequence[tuple[int, Gate]]) -> _GatedProjection:
        columns = self._layout.columns(projection)
        slices: list[_GatedSlice] = []
        down: list[torch.Tensor] = []
        prototypes: list[torch.Tensor] = []
        for s, gate in gates:
            moved = gate.with_tensors(tensor.to(self._device) for tensor in gate.tensors())
            ranks = _append(down, moved.a)
            if isinstance(moved.score, PrototypeScore):
                asked = _append(prototypes, moved.score.prototypes)
            elif isinstance(moved.score, GivenScore):
                asked = slice(0, 0)
            else:
                asked = _append(down, moved.score.query)
            slices.append(_GatedSlice(moved, ranks, asked, columns[s], _component_of_rank(moved)))
        return _GatedProjection(
            torch.cat(down), _filled_up(prototypes) if prototypes else None, tuple(slices)
        )


def _append(rows: list[torch.Tensor], more: torch.Tensor) -> slice:
    """Adds rows below those that are there; where they are."""
    start = sum(len(some) for some in rows)
    rows.append(more)
    return slice(start, start + len(more))


def _filled_up(rows: list[torch.Tensor]) -> torch.Tensor:
    """Below each other, and zeros: products of fewer shapes have to be tried."""
    joined = torch.cat(rows)
    return F.pad(joined, (0, 0, 0, -len(joined) % GATE_MULTIPLE))


def _component_of_rank(gate: Gate) -> torch.Tensor:
    found = torch.zeros(gate.a.shape[0], dtype=torch.int64, device=gate.a.device)
    for k, (start, end) in enumerate(pairwise(gate.rank_indptr)):
        found[start:end] = k
    return found
