"""``Δ(x) = ((w1a w1b) ⊙ (w2a w2b)) x`` (LoHa, arXiv 2108.06098), in rank space.

``add`` never builds the matrix. With ``r`` the rank of the factors::

    U = w1b · diag(x) · w2bᵀ        [r, r]
    Δ(x)_o = w1a[o] · U · w2a[o]ᵀ
"""

from __future__ import annotations

from dataclasses import dataclass

from turret.kernels.rows import row_product
from turret.lazy_torch import torch
from turret.server.adapters.operators import BaseRows, Operator, ServedWeight, pieces

# Rows of the dense form made at once: two temporaries of 1024 x 14336 in fp32 take 117 MB.
_ROWS_PER_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Hadamard(Operator):
    """Adds the update of the formula above; the scaling is folded into ``w1a``.

    Attributes:
        w1a: ``[out_features, rank]``; all four factors are contiguous, in the serving dtype.
        w1b: ``[rank, in_features]``.
        w2a: ``[out_features, rank]``.
        w2b: ``[rank, in_features]``.
    """

    name = "hadamard"

    w1a: torch.Tensor
    w1b: torch.Tensor
    w2a: torch.Tensor
    w2b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.w1b.shape[0]

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        w1a, w1b, w2a, w2b = (factor.float() for factor in self.tensors())
        for rows in pieces(len(x), self.rank * max(x.shape[1], y.shape[1])):
            u = row_product(x[rows].float().unsqueeze(1) * w1b, w2b)
            # U is transposed to get wide rows and to make w1a the product's shared weight.
            terms = row_product(u.transpose(1, 2).contiguous(), w1a) * w2a.T
            total = terms[:, 0]
            # Add term by term, because a library's order of summation is unspecified.
            for number in range(1, self.rank):
                total = total + terms[:, number]
            y[rows] += weight * total

    def add_dense(self, total: torch.Tensor, served: ServedWeight, weight: float) -> None:
        w1a, w1b, w2a, w2b = (factor.float() for factor in self.tensors())
        for start in range(0, total.shape[0], _ROWS_PER_BLOCK):
            rows = slice(start, start + _ROWS_PER_BLOCK)
            total[rows].addcmul_(w1a[rows] @ w1b, w2a[rows] @ w2b, value=weight)

    @property
    def multiply_adds(self) -> int:
        return self.rank * self.rank * (self.w1b.shape[1] + self.w1a.shape[0])
