"""Low-rank updates of experts on the torch path: each adapter's rows go expert by expert.

The factors do not stack with other adapters': which expert a row needs is known only once it has
been routed. So every adapter keeps matrices of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turret.kernels.expert_routing import Routing
from turret.kernels.rows.linear import max_reduction, row_addmm_, row_linear
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import StepMembers
from turret.server.adapters.device.part import Part
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.updates import ExpertLowRank

_Place = tuple[int, str]  # layer, projection


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows of one adapter at one position of their mixes.

    Attributes:
        updates: The adapter's.
        weights: Of each row up to the last one, ``[rows + 1, 1]`` fp32.
        is_in: Whether it is in the run, ``[rows + 1]``; the last entry stands for rows after it.
    """

    updates: dict[_Place, ExpertLowRank]
    weights: torch.Tensor
    is_in: torch.Tensor

    def apply(
        self,
        update: ExpertLowRank,
        x: torch.Tensor,
        y: torch.Tensor,
        routing: Routing,
        rows: torch.Tensor | None,
    ) -> None:
        numbers_of_rows = routing.rows.clamp(max=len(self.is_in) - 1)
        chosen = self.is_in.index_select(0, numbers_of_rows)
        weights = self.weights.index_select(0, numbers_of_rows)
        for expert, pairs in routing.runs:
            numbers = chosen[pairs].nonzero().squeeze(1) + pairs.start
            if not numbers.numel():
                continue
            places = numbers if rows is None else rows.index_select(0, numbers)
            v = row_linear(x.index_select(0, places), update.a[expert])
            v = (v * weights.index_select(0, numbers)).to(y.dtype)
            part = y.index_select(0, numbers)
            size = max_reduction(v.dtype)
            for start in range(0, v.shape[1], size):
                window = slice(start, start + size)
                row_addmm_(part, v[:, window].contiguous(), update.b[expert, window])
            y.index_copy_(0, numbers, part)


@dataclass(frozen=True, slots=True)
class StepExpertUpdates:
    """A step's rows of every adapter that changes experts, position by position in their mixes."""

    runs: Sequence[_Run]

    def apply(
        self,
        layer: int,
        projection: str,
        x: torch.Tensor,
        y: torch.Tensor,
        routing: Routing,
        rows: torch.Tensor | None,
    ) -> None:
        """Add the updates of one layer's projection to ``y``, in place; see ``AdapterStep``."""
        for run in self.runs:
            update = run.updates.get((layer, projection))
            if update is not None:
                run.apply(update, x, y, routing, rows)


class ExpertUpdates(Part):
    """The updates of the adapters in a store, by key."""

    def __init__(self, layout: ProjectionLayout, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self._adapters: dict[str, dict[_Place, ExpertLowRank]] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        """Take up an adapter if it changes experts."""
        found = {
            (layer, name): update.with_tensors(t.to(self._device) for t in update.tensors())
            for name in self._layout.experts
            for layer, update in self._layout.of_experts(operators, name)
        }
        if found:
            self._adapters[key] = found

    def remove(self, key: str) -> None:
        self._adapters.pop(key, None)

    def bind(self, members: StepMembers) -> StepExpertUpdates | None:
        """The step's rows, or None if no row's adapter changes experts."""
        spans = [(row, row + 1, mix) for row, mix in enumerate(members.short)]
        spans += members.long
        chosen = [
            (start, end, [member for member in mix if member[0] in self._adapters])
            for start, end, mix in spans
        ]
        num_rows = max((end for _, end, _ in spans), default=0)
        runs: list[_Run] = []
        for j in range(max((len(mix) for _, _, mix in chosen), default=0)):
            by_key: dict[str, _Run] = {}
            for start, end, mix in chosen:
                if len(mix) <= j:
                    continue
                key, weight = mix[j]
                if key not in by_key:
                    by_key[key] = _Run(
                        self._adapters[key],
                        torch.zeros(num_rows + 1, 1, device=self._device),
                        torch.zeros(num_rows + 1, dtype=torch.bool, device=self._device),
                    )
                by_key[key].weights[start:end] = weight
                by_key[key].is_in[start:end] = True
            runs += by_key.values()
        return StepExpertUpdates(runs) if runs else None
