"""Constant keys and values that adapters attend to beside a step's own, where torch computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from turret.kernels.adapters.constant_attention import Constants, constant_attention_reference
from turret.server.adapters.device.members import Members, passes
from turret.server.adapters.device.part import Part
from turret.server.adapters.operators.adapter_operators import AdapterOperators


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that have an adapter at the same position of their mixes.

    Attributes:
        layers: The adapter's constants by layer.
        rows: Row numbers, ``[n]`` int64, rising.
        weights: Mix weights, ``[n, 1, 1]`` fp32.
    """

    layers: Mapping[int, Constants]
    rows: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepConstants:
    """A step's rows that attend to constants."""

    bound: Sequence[_Rows]

    def attend(self, layer: int, q: torch.Tensor, attended: torch.Tensor) -> None:
        """Add what the rows' adapters attend to, in place; see ``AdapterStep.attend``."""
        for held in self.bound:
            constants = held.layers.get(layer)
            if constants is not None:
                change = constant_attention_reference(q.index_select(0, held.rows), constants)
                total = attended.index_select(0, held.rows).float() + held.weights * change
                attended.index_copy_(0, held.rows, total.to(attended.dtype))


class ConstantsOfAdapters(Part):
    """The constants of every adapter in a store that has some, by key."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, Mapping[int, Constants]] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        if operators.attention is not None:
            self._held[key] = {
                layer: Constants.of(kv.keys.to(self._device), kv.values.to(self._device))
                for layer, kv in operators.attention.items()
            }

    def remove(self, key: str) -> None:
        self._held.pop(key, None)

    def extra_bytes(self, operators: AdapterOperators) -> int:
        constants = (operators.attention or {}).values()
        return sum(Constants.num_bytes(*kv.keys.shape) for kv in constants)

    def bind(self, runs: Sequence[tuple[int, int, Members]]) -> StepConstants | None:
        """A step's rows, or None if none attends to constants.

        Args:
            runs: Runs of rows: first, end, and their mix.
        """
        bound = []
        for key, rows, weights in passes(runs, self._held.keys()) if self._held else ():
            places = torch.tensor(rows, device=self._device)
            values = torch.tensor(weights, device=self._device).view(-1, 1, 1)
            bound.append(_Rows(self._held[key], places, values))
        return StepConstants(bound) if bound else None
