"""The start of training: the config and the tensors of an adapter that changes nothing yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turret.lazy_torch import torch
from turret.server.adapters.base import BaseModule


class NewModule:
    """A module that is to be adapted.

    Args:
        base: The module of the base.
        rank: The rank.
        generator: Draws random tensors; None makes all tensors on the meta device, without memory.

    Attributes:
        name: Its path.
        inputs: The number of inputs.
        outputs: The number of outputs.
        rank: The rank.
    """

    def __init__(self, base: BaseModule, rank: int, generator: torch.Generator | None) -> None:
        self.name = base.name
        self.inputs, self.outputs, self.rank = base.in_features, base.out_features, rank
        self._base = base
        self._generator = generator
        self._device = "meta" if generator is None else "cpu"

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=self._device)

    def ones(self, *shape: int) -> torch.Tensor:
        return torch.ones(shape, device=self._device)

    def kaiming(self, rows: int, columns: int) -> torch.Tensor:
        """Kaiming's uniform initialisation with a = √5, as in PEFT and torch."""
        drawn = torch.rand(rows, columns, generator=self._generator, device=self._device)
        return (drawn * 2 - 1) / math.sqrt(columns)

    def normal(self, rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=self._generator, device=self._device)

    def norms(self) -> torch.Tensor:
        """The norms of the rows of the base's weight."""
        if self._generator is None:
            return self.zeros(self.outputs)
        return torch.linalg.vector_norm(self._base.dequantize(), dim=1)


def _nothing(rank: int, targets: Sequence[str]) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Start:
    """The start of training for a method.

    Attributes:
        tensors: Makes the tensors of a module, by role.
        config: Makes the keys of PEFT's config, besides those of rank, alpha and targets, from the
            rank and the targets.
    """

    tensors: Callable[[NewModule], Mapping[str, torch.Tensor]]
    config: Callable[[int, Sequence[str]], Mapping[str, Any]] = _nothing
