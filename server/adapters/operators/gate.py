"""Gates: low-rank components of one adapter, weighted token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class QueryScore:
    """``α = softmax_k((query x) · keys_kᵀ (a_k x))`` (AdapterFusion, arXiv 2005.00247).

    Attributes:
        query: ``[d_k, in_features]``, serving dtype, contiguous.
        keys: ``[ranks, d_k]``, fp32: key projection times ``b``, so that the score of an update is
            computed from its rank activations. A component without ranks scores 0.
    """

    query: torch.Tensor
    keys: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.query, self.keys)

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> QueryScore:
        return QueryScore(next(tensors), next(tensors))


@dataclass(frozen=True, slots=True)
class PrototypeScore:
    """``α = softmax over top_k of |prototypes x| / temperature`` (Arrow, arXiv 2405.11157).

    Attributes:
        prototypes: ``[K, in_features]``, fp32, contiguous: near a tie, a rounded score would
            choose other components.
        top_k: Components that share a token's weight.
        temperature: What scores are divided by, above 0.
    """

    prototypes: torch.Tensor
    top_k: int
    temperature: float

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.prototypes,)

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> PrototypeScore:
        return PrototypeScore(next(tensors), self.top_k, self.temperature)


@dataclass(frozen=True, slots=True)
class GivenScore:
    """``α`` is what the adapter's ``TokenRouter`` says before the step (X-LoRA, arXiv 2402.07148).

    Attributes:
        module: Which of the router's modules this is.
    """

    module: int

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return ()

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> GivenScore:
        return self


@dataclass(frozen=True, slots=True)
class Gate:
    """``Δ(x) = Σ_k α_k b_kᵀ (a_k x)``, ``α`` of each token from its score.

    The low-rank updates of ``K`` components side by side along the rank axis, weighted by what the
    token asks for. Unlike every other operator it is not linear in ``x``: it has no ``ΔW``.

    Attributes:
        a: ``[ranks, in_features]``, serving dtype, contiguous. Zero past the last component's rank.
        b: ``[ranks, out_features]``, serving dtype, contiguous, scaling folded in; zero likewise.
        score: What a token's weights are computed from.
        rank_indptr: Where each component's ranks begin and end, ``[K + 1]``. A component that does
            not adapt the module has none.
    """

    a: torch.Tensor
    b: torch.Tensor
    score: QueryScore | PrototypeScore | GivenScore
    rank_indptr: tuple[int, ...]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.a, self.b, *self.score.tensors())

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> Gate:
        a, b = next(tensors), next(tensors)
        return Gate(a, b, self.score.with_tensors(tensors), self.rank_indptr)
