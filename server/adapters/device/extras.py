"""The operators of the running adapters that are no stacked or gathered low-rank products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from turret.server.adapters.device.gates import Gates, StepGates
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import StepMembers
from turret.server.adapters.device.shelves import Shelves, StepShelves
from turret.server.adapters.device.vocabulary import Vocabularies, VocabularyChange
from turret.server.adapters.operators import AdapterOperators


@dataclass(frozen=True, slots=True)
class StepExtras:
    """A step's rows of them."""

    banks: StepShelves | None
    fusions: StepGates | None

    def apply(self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of one layer's fused projection to ``y``, in place."""
        if self.banks is not None:
            self.banks.apply(layer, group, x, y)
        if self.fusions is not None:
            self.fusions.apply(layer, group, x, y)


class GatedAdapters(Protocol):
    """Holds learned fusions."""

    def insert(self, key: str, operators: AdapterOperators) -> None: ...
    def remove(self, key: str) -> None: ...


class Extras:
    """Learned fusions, embeddings and heads, and what ``banks`` are for, by adapter key."""

    def __init__(self, device: torch.device, banks: Shelves, fusions: GatedAdapters) -> None:
        self._banks = banks
        self._gated = fusions
        self._tokens = Vocabularies(device)

    def insert(self, key: str, operators: AdapterOperators) -> None:
        """Take in what an adapter has of them, if anything."""
        self._banks.insert(key, operators)
        self._gated.insert(key, operators)
        self._tokens.insert(key, operators)

    def remove(self, key: str) -> None:
        """Forget an adapter; unknown ones are ignored."""
        self._banks.remove(key)
        self._gated.remove(key)
        self._tokens.remove(key)

    def extra_bytes(self, operators: AdapterOperators) -> int:
        """Bytes an adapter takes here past those it takes in host memory."""
        return self._banks.extra_bytes(operators)

    def vocabulary(self, key: str) -> VocabularyChange | None:
        """What an adapter does to embedding and head."""
        return self._tokens.get(key)


class TorchExtras(Extras):
    """Their torch formulations."""

    def __init__(self, layout: ProjectionLayout, device: torch.device, banks: Shelves) -> None:
        self._fusions = Gates(layout, device)
        super().__init__(device, banks, self._fusions)

    def bind(self, members: StepMembers) -> StepExtras:
        """The step's rows."""
        return StepExtras(self._banks.bind(members), self._fusions.bind(members))
