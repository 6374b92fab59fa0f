"""Low-rank updates of experts on the cpu path, where they lie in host memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turret.kernels.cpu.expert_adapters import ExpertAdapters, ExpertTable
from turret.kernels.expert_routing import Routing
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import StepMembers
from turret.server.adapters.device.store import Part
from turret.server.adapters.operators.adapter_operators import AdapterOperators


@dataclass(frozen=True, slots=True)
class CpuStepExperts:
    """A step's rows whose adapters change experts.

    Attributes:
        adapters: The rows.
        numbers: The number of each projection among a layer's.
    """

    adapters: ExpertAdapters
    numbers: dict[str, int]

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
        update = layer * len(self.numbers) + self.numbers[projection]
        self.adapters.adapt(update, x, y, routing, rows)


class CpuExpertUpdates(Part):
    """The tables of the adapters in the store that change experts, by key."""

    def __init__(self, layout: ProjectionLayout) -> None:
        self._layout = layout
        self._numbers = {name: number for number, name in enumerate(layout.experts)}
        self._tables: dict[str, ExpertTable] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        """Take up an adapter if it changes experts."""
        found: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * (
            self._layout.num_layers * len(self._numbers)
        )
        for name, number in self._numbers.items():
            for layer, update in self._layout.of_experts(operators, name):
                found[layer * len(self._numbers) + number] = update.a, update.b
        if any(found):
            self._tables[key] = ExpertTable(found)

    def remove(self, key: str) -> None:
        self._tables.pop(key, None)

    def bind(self, members: StepMembers) -> CpuStepExperts | None:
        """The step's rows, or None if no row's adapter changes experts."""
        spans = [(row, row + 1, mix) for row, mix in enumerate(members.short)]
        rows: list[list[tuple[ExpertTable, float]]] = []
        for start, end, mix in (*spans, *members.long):
            chosen = [(self._tables[key], w) for key, w in mix if key in self._tables]
            if chosen:
                rows += [[] for _ in range(start - len(rows))]
                rows += [chosen] * (end - start)
        return CpuStepExperts(ExpertAdapters(rows), self._numbers) if rows else None
