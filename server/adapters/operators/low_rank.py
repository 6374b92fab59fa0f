"""``Δ(x) = bᵀ (a x)``: LoRA and other products of two factors; experts have one pair each."""

from __future__ import annotations

from dataclasses import dataclass

from turret.kernels.rows import row_addmm_, row_linear
from turret.lazy_torch import torch
from turret.server.adapters.operators import BaseRows, Operator, ServedWeight


@dataclass(frozen=True, slots=True)
class LowRank(Operator):
    """``Δ(x) = bᵀ (a x)``.

    Attributes:
        a: ``[rank, in_features]``, serving dtype, contiguous.
        b: ``[rank, out_features]``, serving dtype, contiguous: ``B`` transposed, with the scaling
            (and, for DoRA, the gain) folded in by one rounding from fp32.
    """

    name = "low_rank"

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        v = row_linear(x, self.a).float()
        row_addmm_(y, v if weight == 1.0 else v * weight, self.b)

    def add_dense(self, total: torch.Tensor, served: ServedWeight, weight: float) -> None:
        total.addmm_(self.b.T.float(), self.a.float(), alpha=weight)


def piece_sums(rank: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The factor ``a`` that sums pieces of ``rank`` inputs: 1 where ``i mod rank = r``, else 0."""
    inputs = torch.arange(in_features)
    a = torch.zeros(rank, in_features, dtype=dtype)
    a[inputs % rank, inputs] = 1
    return a


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The LoRA of one module in the form of PEFT's files: ``y += b (a x) + bias``.

    Attributes:
        a: ``[rank, in_features]`` fp32.
        b: ``[out_features, rank]`` fp32.
        bias: ``[out_features]`` fp32, or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True, slots=True)
class ExpertLowRank(Operator):
    """``Δ(x) = b_eᵀ (a_e x)`` for each expert ``e``'s rows, in one fused projection of a layer.

    Attributes:
        a: ``[experts, rank, in_features]``, serving dtype, contiguous.
        b: ``[experts, rank, out_features]``, serving dtype, contiguous, the scaling folded in.
    """

    name = "update_of_experts"
    has_dense = False

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def expert(self, number: int) -> LowRank:
        """The update of one expert."""
        return LowRank(self.a[number], self.b[number])

    @property
    def multiply_adds(self) -> int:
        """Products per token for one expert."""
        return self.a[0].numel() + self.b[0].numel()
