"""Gates: low-rank components of one adapter, weighted token by token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Self

from turret.kernels.fusion_gate import GATE_MULTIPLE, fusion_gate_reference, routing_gate_reference
from turret.kernels.rows import row_addmm_, row_linear
from turret.lazy_torch import torch
from turret.server.adapters.operators import BaseRows, Operator, Tensors


@dataclass(frozen=True, slots=True)
class QueryScore(Tensors):
    """``α = softmax_k((query x) · keys_kᵀ (a_k x))`` (AdapterFusion, arXiv 2005.00247).

    Attributes:
        query: ``[d_k, in_features]``, serving dtype, contiguous.
        keys: ``[ranks, d_k]``, fp32: the key projection times ``b``, so that the score of an update
            is computed from its rank activations. A component without ranks scores 0.
    """

    query: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True, slots=True)
class PrototypeScore(Tensors):
    """``α = softmax over top_k of |prototypes x| / temperature`` (Arrow, arXiv 2405.11157).

    Attributes:
        prototypes: ``[K, in_features]``, contiguous; fp32, because a rounded score could choose
            other components near a tie.
        top_k: The number of components that share a token's weight.
        temperature: Divisor of the scores, above 0.
    """

    prototypes: torch.Tensor
    top_k: int
    temperature: float


@dataclass(frozen=True, slots=True)
class GivenScore(Tensors):
    """The adapter's ``TokenRouter`` computes ``α`` before the step (X-LoRA, arXiv 2402.07148).

    Attributes:
        module: The gate's number among the router's modules.
    """

    module: int


@dataclass(frozen=True)
class Gate(Operator):
    """``Δ(x) = Σ_k α_k b_kᵀ (a_k x)``, where ``score`` determines each token's ``α``.

    The low-rank updates of ``K`` components are side by side along the rank axis, with weights that
    depend on the token. A gate is therefore not linear in ``x``, and has no ``ΔW``.

    Attributes:
        a: ``[ranks, in_features]``, serving dtype, contiguous. Zero past the last component's rank.
        b: ``[ranks, out_features]``, serving dtype, contiguous, the scaling folded in. Zero past
            the last component's rank, too.
        score: Determines a token's weights.
        rank_indptr: ``[K + 1]``: component ``k`` has the ranks from ``rank_indptr[k]`` up to, but
            not including, ``rank_indptr[k + 1]``. A component that does not adapt the module has no
            ranks.
    """

    name = "gate"
    has_dense = False

    a: torch.Tensor
    b: torch.Tensor
    score: QueryScore | PrototypeScore | GivenScore
    rank_indptr: tuple[int, ...]

    def rounded(self, dtype: torch.dtype) -> Self:
        """The gate itself: its components are already in the serving dtype; scores keep theirs."""
        return self

    @cached_property
    def _component_of_rank(self) -> torch.Tensor:
        """The component of each rank, ``[ranks]`` int64; 0 for the padding, whose factors are 0."""
        found = torch.zeros(self.a.shape[0], dtype=torch.int64, device=self.a.device)
        for k, (start, end) in enumerate(pairwise(self.rank_indptr)):
            found[start:end] = k
        return found

    @cached_property
    def _down(self) -> torch.Tensor:
        """``a`` with the query below it, so that one product computes both."""
        query = (self.score.query,) if isinstance(self.score, QueryScore) else ()
        return torch.cat((self.a, *query)) if query else self.a

    @cached_property
    def _prototypes(self) -> torch.Tensor:
        """The score's prototypes, padded so that fewer shapes need a trial (``rows.py``)."""
        assert isinstance(self.score, PrototypeScore)
        return torch.nn.functional.pad(
            self.score.prototypes, (0, 0, 0, -len(self.score.prototypes) % GATE_MULTIPLE)
        )

    def prepare(self) -> None:
        _ = self._component_of_rank, self._down
        if isinstance(self.score, PrototypeScore):
            _ = self._prototypes

    @property
    def prepared_bytes(self) -> int:
        components = self.a.shape[0] * torch.int64.itemsize
        if isinstance(self.score, QueryScore):
            return components + self.a.nbytes + self.score.query.nbytes
        if isinstance(self.score, PrototypeScore):
            rows, columns = self.score.prototypes.shape
            padded = -(-rows // GATE_MULTIPLE) * GATE_MULTIPLE
            return components + padded * columns * self.score.prototypes.itemsize
        return components

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        found = row_linear(x, self._down)
        v, q = found[:, : len(self.a)], found[:, len(self.a) :]
        scale = (self._weights(x, v, q, base.scalings) * weight).index_select(
            1, self._component_of_rank
        )
        row_addmm_(y, v * scale, self.b)

    def _weights(
        self, x: torch.Tensor, v: torch.Tensor, q: torch.Tensor, scalings: torch.Tensor | None
    ) -> torch.Tensor:
        """``α``, ``[rows, K]`` fp32."""
        if isinstance(self.score, GivenScore):
            assert scalings is not None, "the first pass computes the scores"
            return scalings[:, self.score.module]
        if isinstance(self.score, PrototypeScore):
            similar = row_linear(x.float(), self._prototypes)[:, : len(self.score.prototypes)]
            return routing_gate_reference(similar, self.score.top_k, self.score.temperature)
        return fusion_gate_reference(q, v, self.score.keys, self.rank_indptr)
