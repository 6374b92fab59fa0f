"""A fused projection of the base model with the step's adapters on top."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from turret.server.adapters.device.store import AdapterStep

if TYPE_CHECKING:
    # Not at run time: the GPU benchmark builds layers where bitsandbytes is not installed.
    from turret.server.models.base_linear import BaseLinear


class AdaptedLinear:
    """``y = G ⊙ (W x) + b + Σ_k w_k Δ_k(x)`` for one fused projection of one layer.

    Attributes:
        base: The bias-free base projection. It and the bias change when adapters are merged.
        bias: ``[out]`` in the serving dtype, or None.
    """

    def __init__(self, layer: int, group: str, base: BaseLinear, bias: torch.Tensor | None):
        self.layer = layer
        self.group = group
        self.base = base
        self.bias = bias

    def __call__(self, x: torch.Tensor, adapters: AdapterStep | None) -> torch.Tensor:
        """Project ``[rows, in]`` → ``[rows, out]``, rows ordered as ``adapters`` was made for."""
        if adapters is not None:
            return adapters.project(self.layer, self.group, x, self.bias, self.base)
        y = self.base(x)
        if self.bias is not None:
            y += self.bias
        return y
