"""``Δ(x) = kron(w1, w2) x`` (LoKr, LyCORIS arXiv 2309.14859).

With ``x`` read as a matrix ``X`` of ``[in_m, in_n]``, row-major::

    Δ(x) = vec(w1 · X · w2ᵀ)         kron(w1, w2)[(i,k), (j,l)] = w1[i,j] · w2[k,l]
"""

from __future__ import annotations

from dataclasses import dataclass

from turret.kernels.rows import row_product
from turret.lazy_torch import torch
from turret.server.adapters.operators import BaseRows, Operator, ServedWeight, pieces


@dataclass(frozen=True, slots=True)
class Kronecker(Operator):
    """Adds the update of the formula above.

    Attributes:
        w1: ``[out_l, in_m]``, serving dtype, the scaling folded in.
        w2: ``[out_k, in_n]``, or its factors ``([out_k, rank], [rank, in_n])`` where they are
            smaller. ``out_l · out_k`` and ``in_m · in_n`` are the module's sizes.
    """

    name = "kronecker"

    w1: torch.Tensor
    w2: torch.Tensor | tuple[torch.Tensor, torch.Tensor]

    @property
    def rank(self) -> int:
        return 0 if isinstance(self.w2, torch.Tensor) else self.w2[1].shape[0]

    @property
    def _factors(self) -> tuple[torch.Tensor, ...]:
        """The factors by whose transposes ``X`` is multiplied from the right, in this order."""
        return (self.w2,) if isinstance(self.w2, torch.Tensor) else (self.w2[1], self.w2[0])

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        in_m = self.w1.shape[1]
        w1, factors = self.w1.float(), [factor.float() for factor in self._factors]
        for rows in pieces(len(x), max(x.shape[1], y.shape[1], in_m * factors[-1].shape[0])):
            # [rows, in_m, in_n] → [rows, in_m, out_k] → [rows, out_k, out_l] → [rows, out_l, out_k]
            inner = x[rows].float().unflatten(1, (in_m, -1))
            for factor in factors:
                inner = row_product(inner, factor)
            outer = row_product(inner.transpose(1, 2).contiguous(), w1)
            y[rows] += weight * outer.transpose(1, 2).flatten(1)

    def add_dense(self, total: torch.Tensor, served: ServedWeight, weight: float) -> None:
        w1, *w2 = (factor.float() for factor in self.tensors())
        total.add_(torch.kron(w1, w2[0] if len(w2) == 1 else w2[0] @ w2[1]), alpha=weight)

    @property
    def multiply_adds(self) -> int:
        # X has a row per column of w1. The factors of w2 multiply its rows, then w1 its columns.
        right = self.w1.shape[1] * sum(factor.numel() for factor in self._factors)
        return right + self.w1.numel() * self._factors[-1].shape[0]
