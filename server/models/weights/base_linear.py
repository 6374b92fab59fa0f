"""Bias-free projections of the base model: how their weights are stored is their own affair."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

import torch

from turret.kernels.cpu.row_adapters import Ahead
from turret.kernels.rows.linear import prepare_linear, row_linear
from turret.server.models.weights.nf4 import Nf4Linear


class BaseLinear(Protocol):
    """A fused projection.

    Attributes:
        widths: Outputs of each slice.
        in_features: Inputs, the same for all slices.
    """

    widths: tuple[int, ...]
    in_features: int

    def __call__(
        self, x: torch.Tensor, ahead: Ahead | None = None, num_decode: int | None = None
    ) -> torch.Tensor:
        """Multiply.

        Args:
            x: ``[rows, in]``.
            ahead: What may be brought into the cache meanwhile.
            num_decode: How many rows, the first ones, are of sequences that decode; None for all.
                The gpu path multiplies them in another way than rows of prompts.

        Returns:
            ``[rows, sum(widths)]``, dtype of ``x``.
        """
        ...

    def dequantize(self, index: int) -> torch.Tensor:
        """The weight of slice ``index`` as multiplied, ``[out, in]`` fp32, on the CPU.

        It may be the very memory that is served: not to be written to.
        """
        ...

    def part(self, index: int) -> BaseLinear:
        """Slice ``index`` alone."""
        ...


class DenseLinear:
    """A projection whose weight is stored as numbers.

    Args:
        weight: ``[sum(widths), in]``, contiguous, in the dtype of activations.
        widths: Outputs of each slice.
    """

    def __init__(self, weight: torch.Tensor, widths: tuple[int, ...]) -> None:
        assert sum(widths) == weight.shape[0]
        self.widths = widths
        self.in_features = weight.shape[1]
        self._slices = weight.split(widths)
        self._weight = weight
        prepare_linear(weight)

    def __call__(
        self, x: torch.Tensor, ahead: Ahead | None = None, num_decode: int | None = None
    ) -> torch.Tensor:
        return row_linear(x, self._weight)

    def dequantize(self, index: int) -> torch.Tensor:
        return self._slices[index].float().cpu()

    def part(self, index: int) -> DenseLinear:
        return DenseLinear(self._slices[index], (self.widths[index],))

    @classmethod
    def join(cls, parts: Sequence[DenseLinear]) -> DenseLinear:
        """Fuse projections, in this order."""
        widths = tuple(width for part in parts for width in part.widths)
        return cls(torch.cat([part._weight for part in parts]), widths)


class MixedLinear:
    """Projections that are stored in different ways, side by side.

    Args:
        parts: In the order of their outputs.
    """

    def __init__(self, parts: Sequence[BaseLinear]) -> None:
        self.widths = tuple(width for part in parts for width in part.widths)
        self.in_features = parts[0].in_features
        self._parts = parts
        self._places = [(part, i) for part in parts for i in range(len(part.widths))]

    def __call__(
        self, x: torch.Tensor, ahead: Ahead | None = None, num_decode: int | None = None
    ) -> torch.Tensor:
        return torch.cat([part(x, ahead, num_decode) for part in self._parts], dim=1)

    def dequantize(self, index: int) -> torch.Tensor:
        part, inner = self._places[index]
        return part.dequantize(inner)

    def part(self, index: int) -> BaseLinear:
        part, inner = self._places[index]
        return part.part(inner)


def join_linears(parts: Sequence[Nf4Linear | DenseLinear]) -> BaseLinear:
    """Fuse projections of one input, in this order: one product per run that is stored alike."""
    runs: list[BaseLinear] = []
    for _, group in groupby(parts, type):
        run = list(group)
        nf4 = [part for part in run if isinstance(part, Nf4Linear)]
        dense = [part for part in run if isinstance(part, DenseLinear)]
        if len(run) == 1:
            runs.append(run[0])
        else:
            runs.append(Nf4Linear.join(nf4) if nf4 else DenseLinear.join(dense))
    return runs[0] if len(runs) == 1 else MixedLinear(runs)
