"""``Δ(x) = D x``: a whole matrix, for updates that no other operator represents."""

from __future__ import annotations

from dataclasses import dataclass

from turret.kernels.cpu import has_kernels
from turret.kernels.cpu.products import dot_products
from turret.kernels.rows import prepare_linear, row_linear
from turret.lazy_torch import torch
from turret.server.adapters.operators import BaseRows, Operator, ServedWeight


@dataclass(frozen=True, slots=True)
class Dense(Operator):
    """Adds the product with ``weight``, which is the ``D`` of the formula above.

    Attributes:
        weight: ``[out_features, in_features]``, serving dtype, contiguous, the scaling folded in.
    """

    name = "dense"

    weight: torch.Tensor

    def prepare(self) -> None:
        prepare_linear(self.weight)

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        if has_kernels(x.device):
            change = dot_products(x.float().unsqueeze(0), self.weight.unsqueeze(0))[0]
        else:
            change = row_linear(x, self.weight).float()
        y += change.mul_(weight)

    def add_dense(self, total: torch.Tensor, served: ServedWeight, weight: float) -> None:
        total.add_(self.weight, alpha=weight)
