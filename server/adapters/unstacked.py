"""The operators of the running adapters that are no stacked or gathered low-rank products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from turret.server.adapters.bank import BankSet, BoundBank, StepMembers
from turret.server.adapters.fusion_bank import BoundFusions, FusionBank
from turret.server.adapters.operators import AdapterOperators
from turret.server.adapters.packed_group import PackLayout
from turret.server.adapters.token_bank import TokenBank
from turret.server.adapters.vocabulary_step import VocabularyChange


@dataclass(frozen=True, slots=True)
class BoundUnstacked:
    """A step's rows of them."""

    banks: BoundBank | None
    fusions: BoundFusions | None

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


class Unstacked:
    """Learned fusions, embeddings and heads, and what ``banks`` are for, by adapter key."""

    def __init__(self, device: torch.device, banks: BankSet, fusions: GatedAdapters) -> None:
        self._banks = banks
        self._gated = fusions
        self._tokens = TokenBank(device)

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


class TorchUnstacked(Unstacked):
    """Their torch formulations."""

    def __init__(self, layout: PackLayout, device: torch.device, banks: BankSet) -> None:
        self._fusions = FusionBank(layout, device)
        super().__init__(device, banks, self._fusions)

    def bind(self, members: StepMembers) -> BoundUnstacked:
        """The step's rows."""
        return BoundUnstacked(self._banks.bind(members), self._fusions.bind(members))
