"""The ways in which projections store their weights and multiply by them.

This file has their interface, which the gpu path uses without bitsandbytes.
"""

from __future__ import annotations

from typing import Protocol

import torch

from turret.kernels.cpu.row_adapters import Ahead
from turret.kernels.rows import row_linear_transposed
from turret.server.adapters.base import WeightRows


class BaseLinear(Protocol):
    """A bias-free fused projection of the base model, which hides how its weights are stored.

    Attributes:
        widths: Outputs of each slice.
        in_features: Inputs, the same for all slices.
    """

    widths: tuple[int, ...]
    in_features: int

    def __call__(
        self, x: torch.Tensor, ahead: Ahead | None = None, num_decode: int | None = None
    ) -> torch.Tensor:
        """Multiply rows by the weights of all slices.

        Args:
            x: ``[rows, in]``.
            ahead: The memory to prefetch meanwhile.
            num_decode: The number of leading rows that belong to decoding sequences; None for 0.
                The gpu path multiplies them differently from rows of prompts.

        Returns:
            ``[rows, sum(widths)]``, dtype of ``x``.
        """
        ...

    def served(self, index: int) -> WeightRows:
        """The weight of slice ``index`` as multiplied, ``[out, in]`` in any dtype, by rows."""
        return self.dequantize(index)

    def dequantize(self, index: int) -> torch.Tensor:
        """The weight of slice ``index`` as multiplied, ``[out, in]`` fp32, on the CPU.

        Do not write to it, because it may be the memory that is served.
        """
        ...

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        """``grad · W`` for gradients; the bits of a row depend on that row alone.

        Args:
            grad: ``[rows, sum(widths)]`` fp32.

        Returns:
            ``[rows, in]`` fp32.
        """
        slices = [self.dequantize(index) for index in range(len(self.widths))]
        return row_linear_transposed(grad, torch.cat(slices))

    def part(self, index: int) -> BaseLinear:
        """Slice ``index`` alone, in the memory of the whole projection if its layout allows."""
        ...

    def _rows(self, index: int) -> slice:
        start = sum(self.widths[:index])
        return slice(start, start + self.widths[index])
