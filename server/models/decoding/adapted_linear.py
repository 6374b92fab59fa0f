"""A fused projection of the base model with the step's adapters on top."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from turret.kernels.cpu.row_adapters import Ahead
from turret.server.adapters.device.store import AdapterStep

if TYPE_CHECKING:
    # Not at run time: the GPU benchmark builds layers where bitsandbytes is not installed.
    from turret.server.adapters.device.gpu.store import GpuAdapterStep
    from turret.server.models.weights.base_linear import BaseLinear


class StepProduct:
    """The base projection in one step (``BaseProduct``): whole, or a slice of it.

    Args:
        linear: The projection.
        num_decode: See ``BaseLinear``.
        index: The slice, or None for all.
    """

    def __init__(
        self, linear: AdaptedLinear, num_decode: int | None, index: int | None = None
    ) -> None:
        self._linear = linear
        self._num_decode = num_decode
        self._index = index

    def __call__(self, x: torch.Tensor, ahead: Ahead | None = None) -> torch.Tensor:
        linear = self._linear
        base = linear.base if self._index is None else linear.part(self._index)
        if self._num_decode is None:
            return base(x, ahead)
        return base(x, ahead, self._num_decode)

    def part(self, index: int) -> StepProduct:
        return StepProduct(self._linear, self._num_decode, index)

    def stacked(self, x: torch.Tensor) -> torch.Tensor:
        """``[count, rows, in]`` → ``[count, rows, out]``, every row in the way its own row goes."""
        if self._num_decode is None:
            return self(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        count, num_decode = x.shape[0], self._num_decode
        first, rest = x[:, :num_decode], x[:, num_decode:]
        inputs = torch.cat((first.flatten(0, 1), rest.flatten(0, 1)))
        product = StepProduct(self._linear, count * num_decode, self._index)(inputs)
        decoded, prompts = product.split((count * num_decode, count * rest.shape[1]))
        parts = (decoded.unflatten(0, first.shape[:2]), prompts.unflatten(0, rest.shape[:2]))
        return torch.cat(parts, dim=1)


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
        self._parts: tuple[BaseLinear, dict[int, BaseLinear]] = (base, {})

    def part(self, index: int) -> BaseLinear:
        """Slice ``index`` of the base alone; made once for each base."""
        whole, parts = self._parts
        if whole is not self.base:
            self._parts = whole, parts = self.base, {}
        if index not in parts:
            parts[index] = whole.part(index)
        return parts[index]

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
        if adapters is None:
            y = self.base(x, num_decode=num_decode)
            if self.bias is not None:
                y += self.bias
            return y
        base = StepProduct(self, num_decode)
        y = adapters.multiply(self.layer, self.projection, x, base)
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
