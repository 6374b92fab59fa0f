"""A fused projection of the base model with the step's adapters on top."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from turret.server.adapters.device.store import AdapterStep

if TYPE_CHECKING:
    # Not at run time: the GPU benchmark builds layers where bitsandbytes is not installed.
    from turret.server.adapters.device.gpu.store import GpuAdapterStep
    from turret.server.models.weights.base_linear import BaseLinear


class AdaptedLinear:
    """``y = G ⊙ (W x) + b + Σ_k w_k Δ_k(x)`` for one fused projection of one layer.

    Every path multiplies here: the base gives ``W x``, the step's adapters make ``y`` of it.

    Attributes:
        layer: Layer number.
        projection: Its name (``qkv``, ``o``, ``gate_up``, ``down``).
        base: The bias-free base projection. It and the bias change when adapters are merged.
        bias: ``[out]`` in the serving dtype, or None.
    """

    def __init__(self, layer: int, projection: str, base: BaseLinear, bias: torch.Tensor | None):
        self.layer = layer
        self.projection = projection
        self.base = base
        self.bias = bias

    def __call__(
        self, x: torch.Tensor, adapters: AdapterStep | None, num_decode: int | None = None
    ) -> torch.Tensor:
        """Project.

        Args:
            x: ``[rows, in]``, rows ordered as ``adapters`` was made for.
            adapters: The step's, or None where every row is the base model's.
            num_decode: See ``BaseLinear``.

        Returns:
            ``[rows, out]``.
        """
        base = self.base if num_decode is None else partial(self.base, num_decode=num_decode)
        if adapters is None:
            y = base(x)
            if self.bias is not None:
                y += self.bias
            return y
        inputs, ahead = adapters.inputs(self.layer, self.projection, x)
        y = base(inputs, ahead)
        adapters.apply(self.layer, self.projection, x, y, bias=self.bias, base=base)
        return y

    def gated(
        self,
        x: torch.Tensor,
        adapters: GpuAdapterStep | None,
        num_decode: int,
        activation: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Project onto gates and ups and multiply the activation of the one by the other.

        Where nothing comes between, the base product does it all, in one launch and with the same
        bits.

        Args:
            x: As above.
            adapters: As above, on the gpu path.
            num_decode: As above.
            activation: ``[rows, out]`` → ``[rows, out / 2]``; the base product has the silu.

        Returns:
            ``[rows, out / 2]``.
        """
        product = getattr(self.base, "product", None)
        alone = adapters is None or not adapters.changes(self.layer, self.projection)
        if product is None or not alone or self.bias is not None or num_decode != x.shape[0]:
            return activation(self(x, adapters, num_decode))
        return product.gated(x)
