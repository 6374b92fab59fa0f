"""The parts of a store: each holds some kinds of operators of the adapters in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch

from turret.server.adapters.operators.adapter_operators import AdapterOperators


class Part(ABC):
    """Some operators of every adapter in a store, by adapter key."""

    @abstractmethod
    def insert(self, key: str, operators: AdapterOperators) -> None:
        """Takes in an adapter's operators of this part's kinds, if it has any."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Forget an adapter; unknown ones are ignored."""

    def has_room(self, operators: AdapterOperators) -> bool:
        """Whether an adapter goes in without growing what every step reads."""
        return True

    def extra_bytes(self, operators: AdapterOperators) -> int:
        """Bytes an adapter takes here past those that its operators take in host memory."""
        return 0


class StepPart(Protocol):
    """A step's rows of a part whose updates are added to the result."""

    def apply(self, layer: int, projection: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the updates of one layer's fused projection to ``y``, in place."""
        ...
