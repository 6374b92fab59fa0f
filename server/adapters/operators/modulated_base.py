"""``Δ(x) = (W ⊙ bᵀ a) x = Σ_r b_r ⊙ W (a_r ⊙ x)`` (HiRA, ICLR 2025; a form of GLoRA).

The base multiplies one more row for each rank, and ``add`` makes no matrix as large as the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from turret.lazy_torch import torch
from turret.server.adapters.operators import BaseRows, Operator, ServedWeight

# Maximum number of rows that the base multiplies at once.
_ROWS = 512
# Rows of the dense form that are made at once.
_ROWS_PER_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class ModulatedBase(Operator):
    """Adds the update of the formula above, summed in the order of the ranks.

    Attributes:
        a: ``[rank, in_features]``, serving dtype, contiguous.
        b: ``[rank, out_features]``, serving dtype, contiguous.
    """

    name = "modulated"

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        total = torch.zeros(y.shape, dtype=torch.float32, device=y.device)
        step = max(1, _ROWS // max(len(x), 1))
        for first in range(0, self.rank, step):
            left = self.a[first : first + step].float()
            right = self.b[first : first + step].float()
            rows = (x.float().unsqueeze(0) * left.unsqueeze(1)).to(x.dtype)
            products = base(rows.flatten(0, 1)).view(len(left), len(x), -1)
            for product, row in zip(products, right, strict=True):
                total += product.float() * row
        y += total.mul_(weight)

    def add_dense(self, total: torch.Tensor, served: ServedWeight, weight: float) -> None:
        left, right = self.b.T.float(), self.a.float()
        for start in range(0, total.shape[0], _ROWS_PER_BLOCK):
            rows = slice(start, start + _ROWS_PER_BLOCK)
            total[rows].addcmul_(served.weight[rows], left[rows] @ right, value=weight)

    @property
    def multiply_adds(self) -> int:
        of_base = self.rank * self.a.shape[1] * self.b.shape[1]
        return of_base + self.a.numel() + self.b.numel()
