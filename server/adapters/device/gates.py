"""Gated low-rank updates (learned fusion): each adapter's rows go through shrink, gate and expand.

A gate does not stack with other adapters: its weights come from a softmax over its own components.
So every adapter keeps matrices of its own, and the rows of a step are gathered by adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from turret.kernels.adapters.fusion_gate import fusion_gate_reference
from turret.kernels.rows.linear import max_reduction, row_addmm_, row_linear
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import Members, Rows, StepMembers
from turret.server.adapters.device.part import Part
from turret.server.adapters.operators import AdapterOperators, Gate


@dataclass(frozen=True, slots=True)
class _GatedSlice:
    """One module of a fused projection: its gate and the columns it has in ``x downᵀ`` and ``y``.

    ``component_of_rank`` is ``[ranks]`` int64. A rank that belongs to no component counts as the
    first one's; its activation is 0.
    """

    gate: Gate
    ranks: slice
    query: slice
    columns: slice
    component_of_rank: torch.Tensor

    def add(self, v: torch.Tensor, weights: torch.Tensor | float, y: torch.Tensor) -> None:
        """``y += weight · Σ_k α_k b_kᵀ v_k`` in place, ``v = x downᵀ``."""
        ranks = v[:, self.ranks]
        gates = fusion_gate_reference(
            v[:, self.query], ranks, self.gate.keys, self.gate.rank_indptr
        )
        scale = (gates * weights).index_select(1, self.component_of_rank)
        scaled = (ranks * scale).to(v.dtype)
        size = max_reduction(v.dtype)
        for start in range(0, scaled.shape[1], size):
            window = slice(start, start + size)
            part = scaled[:, window].contiguous()
            row_addmm_(y[:, self.columns], part, self.gate.b[window])


@dataclass(frozen=True, slots=True)
class _GatedProjection:
    """An adapter in one fused projection of one layer.

    ``down`` is ``[Σ (ranks + d_k), in_features]``: per slice, the factors ``a`` and the query.
    """

    down: torch.Tensor
    slices: tuple[_GatedSlice, ...]

    def apply(self, rows: Rows, x: torch.Tensor, y: torch.Tensor) -> None:
        v = row_linear(rows.take(x), self.down)
        part = rows.take(y)
        for gated in self.slices:
            gated.add(v, rows.weights, part)
        rows.put(y, part)


_Place = tuple[int, str]  # layer, projection
_Run = tuple[dict[_Place, _GatedProjection], Rows]


@dataclass(frozen=True, slots=True)
class StepGates:
    """A step's rows of every gated adapter, position by position in their mixes."""

    runs: Sequence[_Run]

    def apply(self, layer: int, projection: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of one layer's fused projection to ``y``, in place."""
        for places, rows in self.runs:
            gated = places.get((layer, projection))
            if gated is not None:
                gated.apply(rows, x, y)


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
            *self._short_runs(members.short),
            *(
                (self._adapters[key], Rows(slice(start, end), 0, weight))
                for start, end, mix in members.long
                for key, weight in mix
                if key in self._adapters
            ),
        ]
        return StepGates(runs) if runs else None

    def _short_runs(self, short: Sequence[Members]) -> list[_Run]:
        runs = []
        gated = [[member for member in mix if member[0] in self._adapters] for mix in short]
        for j in range(max((len(mix) for mix in gated), default=0)):
            by_key: dict[str, list[tuple[int, float]]] = {}
            for row, mix in enumerate(gated):
                if len(mix) > j:
                    by_key.setdefault(mix[j][0], []).append((row, mix[j][1]))
            for key, found in by_key.items():
                rows = torch.tensor([row for row, _ in found], device=self._device)
                weights = torch.tensor([[weight] for _, weight in found], device=self._device)
                runs.append((self._adapters[key], Rows(rows, 0, weights)))
        return runs

    def _gated(self, projection: str, gates: Sequence[tuple[int, Gate]]) -> _GatedProjection:
        columns = self._layout.columns(projection)
        slices, down, cursor = [], [], 0
        for s, gate in gates:
            moved = gate.with_tensors(tensor.to(self._device) for tensor in gate.tensors())
            split = cursor + moved.a.shape[0]
            end = split + moved.query.shape[0]
            slices.append(
                _GatedSlice(
                    gate=moved,
                    ranks=slice(cursor, split),
                    query=slice(split, end),
                    columns=columns[s],
                    component_of_rank=_component_of_rank(moved),
                )
            )
            down += (moved.a, moved.query)
            cursor = end
        return _GatedProjection(torch.cat(down), tuple(slices))


def _component_of_rank(gate: Gate) -> torch.Tensor:
    found = torch.zeros(gate.a.shape[0], dtype=torch.int64, device=gate.a.device)
    for k, (start, end) in enumerate(pairwise(gate.rank_indptr)):
        found[start:end] = k
    return found
