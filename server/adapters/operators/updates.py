"""What an adapter adds to a linear module: updates ``Δ(x)``, each of a form of its own.

See ``operators.py`` for what is done with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LowRank:
    """``Δ(x) = bᵀ (a x)``.

    Attributes:
        a: ``[rank, in_features]``, serving dtype, contiguous.
        b: ``[rank, out_features]``, serving dtype, contiguous: ``B`` transposed, with the scaling
            (and, for DoRA, the gain) folded in by one rounding from fp32.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.a, self.b)

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> LowRank:
        """The same operator with other tensors, which are given in the order of ``tensors()``.

        Every operator has this method.
        """
        return LowRank(next(tensors), next(tensors))


def piece_sums(rank: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The ``a`` that adds up pieces of ``rank`` inputs, 1 where ``i mod rank = r``."""
    inputs = torch.arange(in_features)
    a = torch.zeros(rank, in_features, dtype=dtype)
    a[inputs % rank, inputs] = 1
    return a


@dataclass(frozen=True, slots=True)
class Hadamard:
    """``Δ(x) = ((w1a w1b) ⊙ (w2a w2b)) x``; the scaling is folded into ``w1a``.

    Attributes:
        w1a: ``[out_features, rank]``, serving dtype, contiguous; so are all four.
        w1b: ``[rank, in_features]``.
        w2a: ``[out_features, rank]``.
        w2b: ``[rank, in_features]``.
    """

    w1a: torch.Tensor
    w1b: torch.Tensor
    w2a: torch.Tensor
    w2b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.w1b.shape[0]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.w1a, self.w1b, self.w2a, self.w2b)

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> Hadamard:
        return Hadamard(next(tensors), next(tensors), next(tensors), next(tensors))


@dataclass(frozen=True, slots=True)
class Kronecker:
    """``Δ(x) = kron(w1, w2) x``, ``kron(w1, w2)[(i,k), (j,l)] = w1[i,j] · w2[k,l]``.

    Attributes:
        w1: ``[out_l, in_m]``, serving dtype, the scaling folded in.
        w2: ``[out_k, in_n]``, or its factors ``([out_k, rank], [rank, in_n])`` where they are
            smaller. ``out_l · out_k`` and ``in_m · in_n`` are the module's sizes.
    """

    w1: torch.Tensor
    w2: torch.Tensor | tuple[torch.Tensor, torch.Tensor]

    @property
    def rank(self) -> int:
        return 0 if isinstance(self.w2, torch.Tensor) else self.w2[1].shape[0]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.w1, self.w2) if isinstance(self.w2, torch.Tensor) else (self.w1, *self.w2)

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> Kronecker:
        w1, w2 = next(tensors), next(tensors)
        return Kronecker(w1, w2 if isinstance(self.w2, torch.Tensor) else (w2, next(tensors)))


# Inputs of a module that 16 bits can name.
MAX_SPARSE_INPUTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Sparse:
    """``Δ(x) = S x``, ``S`` a few entries of the weight, as compressed rows.

    Attributes:
        values: ``[entries]``, serving dtype, the scaling folded in.
        columns: The input of each, ``[entries]`` uint16.
        row_starts: The entries of output ``o`` are ``[row_starts[o], row_starts[o + 1])``,
            ``[out_features + 1]`` int32.
    """

    values: torch.Tensor
    columns: torch.Tensor
    row_starts: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.values, self.columns, self.row_starts)

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> Sparse:
        return Sparse(next(tensors), next(tensors), next(tensors))

    def rows(self) -> torch.Tensor:
        """The output of each entry, ``[entries]`` int64."""
        lengths = self.row_starts.to(torch.int64).diff()
        return torch.repeat_interleave(lengths)


@dataclass(frozen=True, slots=True)
class Circulant:
    """``Δ(x)_mj = Σ_n Σ_i kernel_mn,(i − j) mod b x_ni``: a circulant matrix per block (C3A).

    Attributes:
        kernel: ``[out / b, in / b, b]``, serving dtype, contiguous, the scaling folded in.
    """

    kernel: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.kernel,)

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> Circulant:
        return Circulant(next(tensors))


@dataclass(frozen=True, slots=True)
class Dense:
    """``Δ(x) = D x``, ``D`` as large as the weight: where no other operator is exact.

    Attributes:
        weight: ``[out_features, in_features]``, serving dtype, contiguous, the scaling folded in.
    """

    weight: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,)

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> Dense:
        return Dense(next(tensors))


@dataclass(frozen=True, slots=True)
class ExpertLowRank:
    """``Δ(x) = b_eᵀ (a_e x)`` for the rows of each expert ``e``: one fused projection of a layer.

    Attributes:
        a: ``[experts, rank, in_features]``, serving dtype, contiguous.
        b: ``[experts, rank, out_features]``, serving dtype, contiguous, the scaling folded in.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.a, self.b)

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> ExpertLowRank:
        return ExpertLowRank(next(tensors), next(tensors))
