"""A matrix as a product of two thin ones, and the truncated SVD that makes it thinner."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Directions weaker than this share of the strongest one are lost in fp32 rounding.
_NOISE = float(torch.finfo(torch.float32).eps)

# Takes descending singular values and returns how many to keep.
ChooseRank = Callable[[torch.Tensor], int]


@dataclass(frozen=True, slots=True)
class Factors:
    """The matrix ``b @ a``.

    Attributes:
        b: ``[rows, rank]``, fp32 or fp64.
        a: ``[rank, columns]``, same dtype.
    """

    b: torch.Tensor
    a: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def norm(self) -> float:
        """Frobenius norm; the product is not built, and cancellation in it costs no digits."""
        left = torch.linalg.qr(self.b.double(), mode="r").R
        right = torch.linalg.qr(self.a.double().T, mode="r").R
        return float(torch.linalg.matrix_norm(left @ right.T))

    def truncated(self, choose_rank: ChooseRank) -> Factors:
        """The nearest product of the chosen rank, fp32; costs as much as the factors are thick."""
        qb, rb = torch.linalg.qr(self.b.double())
        qa, ra = torch.linalg.qr(self.a.double().T)
        core = truncated_svd(rb @ ra.T, choose_rank)
        return Factors((qb @ core.b).float(), (core.a @ qa.T).float())


def side_by_side(parts: Sequence[Factors]) -> Factors:
    """The sum of the products; the ranks add up."""
    return Factors(
        torch.cat([part.b for part in parts], dim=1), torch.cat([part.a for part in parts])
    )


def energy_rank(values: torch.Tensor, energy: float) -> int:
    """The least number of singular values that hold a share of the sum of squares.

    Args:
        values: Descending, not empty.
        energy: In (0, 1].
    """
    held = values.double().square().cumsum(0)
    return min(len(values), int((held < energy * held[-1]).sum()) + 1)


def truncated_svd(matrix: torch.Tensor, choose_rank: ChooseRank) -> Factors:
    """The nearest product of the chosen rank (Eckart and Young), in the dtype of the matrix.

    As in PEFT, ``a`` has orthonormal rows and ``b`` holds the singular values. Directions that are
    nothing but rounding are never kept, so the rank may be less than the chosen one.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    audible = max(1, int((values > _NOISE * values[0]).sum()))
    rank = min(choose_rank(values[:audible]), audible)
    return Factors(left[:, :rank] * values[:rank], right[:rank].contiguous())


def ratio(error: float, reference: float) -> float:
    """A relative error; 0 where there is neither, infinite where nothing should be."""
    if reference == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / reference
