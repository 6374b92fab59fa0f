"""Hadamard and Kronecker kernels against float64.

Planted faults, and how many of the tests here each one fails (tried by hand):

- hadamard shrink: every part begins at 0: 8
- hadamard shrink: ranks past r read: 6
- hadamard shrink: x dropped: 8
- hadamard expand: first part only: 8
- hadamard expand: weight dropped: 8
- hadamard expand: always slice 0: 4
- kronecker: weight dropped: 24
- kronecker: output order swapped: 20
- kronecker: x read past in_n: 24
- kronecker: columns past out_k written: 0 (a race on a GPU; the interpreter runs in order)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_traffic import DEVICE, DTYPES, HALF, MAX_ERROR, error_ratio

from turret.kernels.gpu.hadamard import hadamard_expand, hadamard_shrink
from turret.kernels.gpu.kronecker import kronecker
from turret.kernels.gpu.tables import RowTable

SLOTS = 4
# Rank of the factors, input width, widths of the slices.
HADAMARD = [(1, 40, (24,)), (3, 100, (70, 33)), (16, 72, (50,)), (20, 90, (40, 17, 5))]
# out_l, in_m, out_k, in_n.
KRONECKER = [
    (1, 1, 40, 56),
    (2, 3, 24, 3),
    (4, 4, 50, 40),
    (24, 24, 24, 24),
    (8, 16, 5, 36),
    (3, 48, 70, 2),
]


class Hadamard:
    """Random factors, inputs and base results."""

    def __init__(self, shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype) -> None:
        rank, inner, outs = shape

        def factor(*shape: int) -> torch.Tensor:
            return torch.randn(shape).div_(shape[-1] ** 0.5).to(DEVICE, dtype)

        self.outs = outs
        self.w1b, self.w2b = (factor(SLOTS, len(outs), rank, inner) for _ in range(2))
        self.w1a = [factor(SLOTS, out, rank) for out in outs]
        self.w2a = [factor(SLOTS, out, rank) for out in outs]
        self.x = torch.randn(9, inner).to(DEVICE, dtype)
        self.y = torch.randn(9, sum(outs)).to(DEVICE, dtype)

    def exact(self, row: int, slot: int, weight: float) -> torch.Tensor:
        """``y + w Δ(x)`` of one row in float64, ΔW built."""
        parts = []
        for s in range(len(self.outs)):
            left = self.w1a[s][slot].double() @ self.w1b[slot, s].double()
            right = self.w2a[s][slot].double() @ self.w2b[slot, s].double()
            parts.append((left * right) @ self.x[row].double())
        return self.y[row].double() + weight * torch.cat(parts)


class Kronecker:
    """Random factors, inputs and base results; ``rank`` 0 is a dense second factor."""

    def __init__(self, shape: tuple[int, int, int, int], rank: int, dtype: torch.dtype) -> None:
        out_l, in_m, out_k, in_n = shape

        def factor(*shape: int) -> torch.Tensor:
            return torch.randn(shape).div_(shape[-1] ** 0.5).to(DEVICE, dtype)

        self.w1 = factor(SLOTS, out_l, in_m)
        self.w2: Any = factor(SLOTS, out_k, in_n)
        if rank:
            self.w2 = (factor(SLOTS, out_k, rank), factor(SLOTS, rank, in_n))
        # Behind every row lies what must not be read.
        wide = torch.full((9, in_m * in_n + 64), float("nan"), device=DEVICE, dtype=dtype)
        self.x = wide[:, : in_m * in_n].copy_(torch.randn(9, in_m * in_n))
        # The slice is a part of a fused projection.
        self.whole = torch.randn(9, 5 + out_l * out_k).to(DEVICE, dtype)

    def exact(self, row: int, slot: int, weight: float) -> torch.Tensor:
        dense = self.w2[slot] if isinstance(self.w2, torch.Tensor) else None
        if dense is None:
            dense = self.w2[0][slot].double() @ self.w2[1][slot].double()
        delta = torch.kron(self.w1[slot].double(), dense.double()) @ self.x[row].double()
        return self.whole[row, 5:].double() + weight * delta


ROWS, SLOT_OF, WEIGHT_OF = [7, 0, 3, 4], [2, 0, 2, 3], [1.0, -0.5, 0.25, 1.0]


def make_row_table(capacity: int = 6) -> RowTable:
    table = RowTable(capacity, DEVICE)
    table.load(ROWS, SLOT_OF, WEIGHT_OF)
    return table


@pytest.mark.parametrize("shape", HADAMARD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard_on_triton(shape, dtype):
    case = Hadamard(shape, dtype)
    table = make_row_table()
    u = hadamard_shrink(case.x, case.w1b, case.w2b, table)
    y = case.y.clone()
    hadamard_expand(y, u, case.w1a, case.w2a, table)
    for row in range(9):
        if row not in ROWS:
            assert torch.equal(y[row], case.y[row])
            continue
        i = ROWS.index(row)
        expected = case.exact(row, SLOT_OF[i], WEIGHT_OF[i])
        assert error_ratio(y[row], expected) < MAX_ERROR[dtype]


@pytest.mark.parametrize("shape", KRONECKER)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kronecker_on_triton(shape, rank, dtype):
    case = Kronecker(shape, rank, dtype)
    whole = case.whole.clone()
    kronecker(case.x, whole[:, 5:], case.w1, case.w2, make_row_table())
    assert torch.equal(whole[:, :5], case.whole[:, :5])
    for row in range(9):
        if row not in ROWS:
            assert torch.equal(whole[row], case.whole[row])
            continue
        i = ROWS.index(row)
        expected = case.exact(row, SLOT_OF[i], WEIGHT_OF[i])
        assert error_ratio(whole[row, 5:], expected) < MAX_ERROR[dtype]


def test_an_empty_table_changes_nothing():
    table = make_row_table()
    table.load([], [], [])
    case = Hadamard(HADAMARD[1], HALF)
    y = case.y.clone()
    u = hadamard_shrink(case.x, case.w1b, case.w2b, table)
    hadamard_expand(y, u, case.w1a, case.w2a, table)
    assert torch.equal(y, case.y)
    other = Kronecker(KRONECKER[1], 0, HALF)
    whole = other.whole.clone()
    kronecker(other.x, whole[:, 5:], other.w1, other.w2, table)
    assert torch.equal(whole, other.whole)


def test_breaches_of_the_contract_are_refused():
    table = make_row_table()
    case = Hadamard(HADAMARD[1], HALF)
    with pytest.raises(ValueError, match="6 rows are allocated"):
        table.load(range(7), [0] * 7, [1.0] * 7)
    with pytest.raises(ValueError, match="3 slots"):
        table.load([0], [0, 1, 2], [1.0])
    wide = torch.zeros(1, 1, 65, 100, device=DEVICE, dtype=HALF)
    with pytest.raises(ValueError, match="over 64"):
        hadamard_shrink(case.x, wide, wide, table)
    with pytest.raises(ValueError, match="w2b"):
        hadamard_shrink(case.x, case.w1b, case.w2b[:, :, :2], table)
    u = hadamard_shrink(case.x, case.w1b, case.w2b, table)
    with pytest.raises(ValueError, match="y is"):
        hadamard_expand(case.y[:, 1:], u, case.w1a, case.w2a, table)
    with pytest.raises(ValueError, match="w2a"):
        hadamard_expand(case.y, u, case.w1a, [f.float() for f in case.w2a], table)
    other = Kronecker(KRONECKER[1], 0, HALF)
    with pytest.raises(ValueError, match="y is"):
        kronecker(other.x, other.whole[:, 4:], other.w1, other.w2, table)
    with pytest.raises(ValueError, match="in_m is 129"):
        kronecker(other.x, other.whole, torch.zeros(4, 1, 129, dtype=HALF), other.w2, table)
