"""A mixture of experts in place of a layer's MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from turret.kernels.expert_routing import Routing
from turret.server.adapters.device.store import AdapterStep
from turret.server.models.decoding.adapted_linear import AdaptedLinear


class ExpertProduct(Protocol):
    """The bias-free weights of all experts; see ``Nf4Experts``."""

    out_features: int
    in_features: int

    def __call__(
        self, x: torch.Tensor, routing: Routing, rows: torch.Tensor | None
    ) -> torch.Tensor: ...
    def dequantize(self, expert: int) -> torch.Tensor: ...


class AdaptedExperts:
    """``y_p = W_e x_p + b_e + Σ_k w_k Δ_k(x_p)`` for pairs of a row and an expert.

    Args:
        layer: Layer number.
        projection: ``experts_gate_up`` or ``experts_down``.
        base: The experts' weights.
        bias: ``[experts, out]`` in the serving dtype, or None.
    """

    def __init__(
        self, layer: int, projection: str, base: ExpertProduct, bias: torch.Tensor | None
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
        """Project.

        Args:
            x: ``[rows, in]``, or ``[pairs, in]``.
            routing: The pairs.
            adapters: The step's, or None.
            rows: The row of ``x`` that each pair reads, ``[pairs]`` int64; None for its own.

        Returns:
            ``[pairs, out]``.
        """
        y = self.base(x, routing, rows)
        if self.bias is not None:
            y += self.bias.index_select(0, routing.experts)
        if adapters is not None:
            adapters.apply_experts(self.layer, self.projection, x, y, routing, rows)
        return y


@dataclass(slots=True, kw_only=True)
class ExpertMixture:
    """The weights of a mixture.

    Attributes:
        router: ``[rows, hidden]`` to scores, ``[rows, experts]``; not quantised.
        gate_up: Gates and ups of each expert.
        down: Back to the hidden size.
    """

    router: AdaptedLinear
    gate_up: AdaptedExperts
    down: AdaptedExperts
