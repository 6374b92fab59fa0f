"""A fused projection of the base model with the step's adapters on top.

On the gpu path, the first ``num_decode`` rows, those of decoding sequences, are multiplied
differently from rows of prompts. There, the launches of a product may also compute the *shrink*
(the first half of the low-rank updates) or the *epilogue* (the operation after the projection).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from turret.kernels.cpu.row_adapters import Ahead
from turret.kernels.expert_routing import Routing
from turret.server.adapters.device import AdapterStep, ExpertPairs

if TYPE_CHECKING:
    from turret.kernels.gpu.low_rank import Shrink
    from turret.kernels.gpu.nf4 import Epilogue
    from turret.server.adapters.device.gpu_store import GpuAdapterStep
    from turret.server.models.weights import BaseLinear
    from turret.server.models.weights.nf4_experts import Nf4Experts
    from turret.server.models.weights.nf4_gpu import Nf4Product


# Larger than the number of rows of any step.
_ALL = 1 << 62


class StepProduct:
    """The base projection in one step (a ``BaseProduct``): all of it, or one slice.

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
        return base(x, ahead, min(self._num_decode, x.shape[0]))

    def part(self, index: int) -> StepProduct:
        return StepProduct(self._linear, self._num_decode, index)

    def alone(self, *, is_decode: bool) -> StepProduct:
        """The product for rows outside the step. Either all of them decode, or none does."""
        return StepProduct(self._linear, _ALL if is_decode else 0, self._index)

    def with_shrink(self, x: torch.Tensor, shrink: Shrink) -> tuple[torch.Tensor, torch.Tensor]:
        """The product and the rank activations of all rows, in one launch where possible."""
        product = self._product
        if product is None or self._num_decode is None:
            return self(x), shrink(x)
        return product.with_shrink(x, self._num_decode, shrink)

    def with_epilogue(
        self, x: torch.Tensor, epilogue: Epilogue, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The epilogue's result, in the launches of the product; None if this is impossible."""
        product = self._product
        if product is None or self._num_decode != x.shape[0]:
            return None
        return product.with_epilogue(x, epilogue, bias)

    @property
    def _product(self) -> Nf4Product | None:
        """The NF4 product of the whole projection, on the gpu path only."""
        if self._index is not None or self._num_decode is None:
            return None
        return getattr(self._linear.base, "product", None)


class AdaptedLinear:
    """``y = G ⊙ (W x) + b + Σ_k w_k Δ_k(x)`` for one fused projection of one layer.

    All compute paths use it. The base computes ``W x``, and the step's adapters compute ``y`` from
    that. ``adapter_operators.py`` defines ``G`` and ``Δ_k``.

    Attributes:
        layer: Layer number.
        projection: The projection's name (``qkv``, ``o``, ``gate_up``, ``down``, ``router``).
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
        """Slice ``index`` of the base alone; created once for each base."""
        whole, parts = self._parts
        if whole is not self.base:
            self._parts = whole, parts = self.base, {}
        if index not in parts:
            parts[index] = whole.part(index)
        return parts[index]

    def __call__(
        self, x: torch.Tensor, adapters: AdapterStep | None, num_decode: int | None = None
    ) -> torch.Tensor:
        """Project rows and apply the adapters.

        Args:
            x: ``[rows, in]``, with the rows in the order for which ``adapters`` was made.
            adapters: The step's adapters, or None if every row is the base model's.
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
        return adapters.project(self.layer, self.projection, x, bias=self.bias, base=base)

    def with_epilogue(
        self,
        x: torch.Tensor,
        adapters: GpuAdapterStep | None,
        num_decode: int,
        epilogue: Epilogue,
    ) -> torch.Tensor:
        """Project on the gpu path and apply the next operation, in the same launches if possible.

        Args:
            x: See ``__call__``.
            adapters: See ``__call__``.
            num_decode: See ``BaseLinear``.
            epilogue: The operation that follows.

        Returns:
            The result of ``epilogue`` on the projection, with the same bits.
        """
        base = StepProduct(self, num_decode)
        if adapters is None or not adapters.changes(self.layer, self.projection):
            result = base.with_epilogue(x, epilogue, self.bias)
            return epilogue(self(x, None, num_decode)) if result is None else result
        place = self.layer, self.projection
        return adapters.project(*place, x, bias=self.bias, base=base, epilogue=epilogue)


class AdaptedExperts:
    """``y_p = W_e x_p + b_e + Σ_k w_k Δ_k(x_p)`` for pairs of a row and an expert.

    Args:
        layer: Layer number.
        projection: ``experts_gate_up`` or ``experts_down``.
        base: The experts' weights.
        bias: ``[experts, out]`` in the serving dtype, or None.
    """

    def __init__(
        self, layer: int, projection: str, base: Nf4Experts, bias: torch.Tensor | None
    ) -> None:
        self.layer = layer
        self.projection = projection
        self.base = base
        self.bias = bias

    def __call__(
        self,
        x: torch.Tensor,
        routing: Routing,
        adapters: AdapterStep | None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Project every pair and apply the adapters.

        Args:
            x: ``[rows, in]``, or ``[pairs, in]``.
            routing: The pairs.
            adapters: The step's adapters, or None.
            rows: The row of ``x`` that each pair reads, ``[pairs]`` int64; None if ``x`` has one
                row per pair.

        Returns:
            ``[pairs, out]``.
        """
        y = self.base(x, routing, rows)
        if self.bias is not None:
            y += self.bias.index_select(0, routing.experts)
        if adapters is not None:
            place = self.layer, self.projection
            adapters.apply_experts(ExpertPairs(*place, x, y, routing, rows))
        return y


@dataclass(slots=True, kw_only=True)
class ExpertMixture:
    """The weights of a mixture of experts in one layer.

    Attributes:
        router: Maps ``[rows, hidden]`` to scores, ``[rows, experts]``; not quantised.
        gate_up: Computes the gates and ups of each expert.
        down: Maps the result back to the hidden size.
    """

    router: AdaptedLinear
    gate_up: AdaptedExperts
    down: AdaptedExperts
