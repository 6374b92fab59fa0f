"""Operators that are a vector: gains on outputs, gains on inputs, biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from turret.lazy_torch import torch
from turret.server.adapters.operators import BaseRows, Operator, ServedWeight


@dataclass(frozen=True, slots=True)
class Vector(Operator):
    """A number per channel.

    Attributes:
        values: ``[out_features]``, or ``[in_features]`` for an input gain; fp32.
    """

    values: torch.Tensor

    def rounded(self, dtype: torch.dtype) -> Self:
        """The vector in fp32, which it keeps when it is served."""
        return type(self)(self.values.reshape(-1).to(torch.float32))


@dataclass(frozen=True, slots=True)
class Gain(Vector):
    """``Δ(x) = (g − 1) ⊙ W x``, on the bias-free base result (DoRA, IA3 on outputs)."""

    name = "gain"

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        y += weight * (self.values - 1.0) * base.result.float()

    def add_dense(self, total: torch.Tensor, served: ServedWeight, weight: float) -> None:
        total.addcmul_(served.weight, (self.values - 1.0)[:, None], value=weight)


@dataclass(frozen=True, slots=True)
class InputGain(Vector):
    """``Δ(x) = W ((l − 1) ⊙ x)``: the base multiplies ``l ⊙ x`` (IA3 on feed-forward inputs).

    The module's other operators still receive ``x``. A gain must not be combined with an input
    gain, because the sum of both does not define whether the gain also scales the input gain's
    change.
    """

    name = "input_gain"

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        y += weight * base((x.float() * (self.values - 1.0)).to(x.dtype)).float()

    def add_dense(self, total: torch.Tensor, served: ServedWeight, weight: float) -> None:
        total.addcmul_(served.weight, (self.values - 1.0)[None, :], value=weight)


@dataclass(frozen=True, slots=True)
class Bias(Vector):
    """``Δ(x) = b``. Changes no weight: a merge adds it to the base's bias."""

    name = "bias"

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        y += weight * self.values

    def add_dense(self, total: torch.Tensor, served: ServedWeight, weight: float) -> None:
        pass

    @property
    def multiply_adds(self) -> int:
        return 0
