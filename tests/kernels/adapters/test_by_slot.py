"""Hadamard and Kronecker kernels compared with float64.

Planted faults, and the number of tests that each of them fails (tried by hand):

- hadamard shrink: every part begins at 0: 8
- hadamard shrink: ranks past r read: 6
- hadamard shrink: x dropped: 8
- hadamard expand: first part only: 8
- hadamard expand: weight dropped: 8
- kronecker: weight dropped: 24
- kronecker: output order swapped: 20
- kronecker: x read past in_n: 24
- kronecker: columns past out_k written: 0 (a race on a GPU; the interpreter runs in order)
"""

from __future__ import annotations

import pytest
import torch
from kernel_traffic import DEVICE, DTYPES, HALF, MAX_ERROR, error_ratio
from ptx.addresses import address_of

from turret.kernels.gpu.hadamard import hadamard_expand, hadamard_shrink
from turret.kernels.gpu.kronecker import kronecker
from turret.kernels.gpu.tables import RowTable

SLOTS = 4
# The rank of the factors, the input width and the output width.
HADAMARD = [(1, 40, 24), (3, 100, 70), (16, 72, 50), (20, 90, 17)]
# out_l, in_m, out_k, in_n.
KRONECKER = [
    (1, 1, 40, 56),
    (2, 3, 24, 3),
    (4, 4, 50, 40),
    (24, 24, 24, 24),
    (8, 16, 5, 36),
    (3, 48, 70, 2),
]


def factor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).div_(shape[-1] ** 0.5).to(DEVICE, dtype)


def addresses(found: list[list[torch.Tensor]]) -> torch.Tensor:
    """The addresses of each slot's factors; 0 for slots without factors."""
    width = max(map(len, found))
    places = [[address_of(t) for t in own] or [0] * width for own in found]
    return torch.tensor(places, device=DEVICE)


class Hadamard:
    """Random factors, inputs and base results. Slot 1 has no factors."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.rank, inner, out = shape
        wide, narrow = (out, self.rank), (self.rank, inner)
        self.found = [
            [factor(*shape, dtype=dtype) for shape in (wide, narrow) * 2] if slot != 1 else []
            for slot in range(SLOTS)
        ]
        self.factors = addresses(self.found)
        self.x = torch.randn(9, inner).to(DEVICE, dtype)
        # The slice is a part of a fused projection.
        self.whole = torch.randn(9, 5 + out).to(DEVICE, dtype)

    def add(self, table: RowTable) -> torch.Tensor:
        whole = self.whole.clone()
        u = hadamard_shrink(self.x, self.factors, self.rank, table)
        hadamard_expand(whole[:, 5:], u, self.factors, table)
        return whole

    def exact(self, row: int, slot: int, weight: float) -> torch.Tensor:
        """``y + w Δ(x)`` of one row in float64, with a dense ΔW."""
        change = torch.zeros(self.whole.shape[1] - 5, dtype=torch.float64, device=DEVICE)
        if self.found[slot]:
            w1a, w1b, w2a, w2b = (t.double() for t in self.found[slot])
            change = ((w1a @ w1b) * (w2a @ w2b)) @ self.x[row].double()
        return self.whole[row, 5:].double() + weight * change


class Kronecker:
    """Random factors, inputs and base results; ``rank`` 0 is a dense second factor."""

    def __init__(self, shape: tuple[int, int, int, int], rank: int, dtype: torch.dtype) -> None:
        out_l, in_m, out_k, in_n = shape
        second = [(out_k, rank), (rank, in_n)] if rank else [(out_k, in_n)]
        self.shapes = [(out_l, in_m), *second]
        self.found = [
            [factor(*shape, dtype=dtype) for shape in self.shapes] if slot != 1 else []
            for slot in range(SLOTS)
        ]
        self.factors = addresses(self.found)
        # Memory after every row must not be read.
        wide = torch.full((9, in_m * in_n + 64), float("nan"), device=DEVICE, dtype=dtype)
        self.x = wide[:, : in_m * in_n].copy_(torch.randn(9, in_m * in_n))
        self.whole = torch.randn(9, 5 + out_l * out_k).to(DEVICE, dtype)

    def add(self, table: RowTable) -> torch.Tensor:
        whole = self.whole.clone()
        kronecker(self.x, whole[:, 5:], self.factors, self.shapes, table)
        return whole

    def exact(self, row: int, slot: int, weight: float) -> torch.Tensor:
        change = torch.zeros(self.whole.shape[1] - 5, dtype=torch.float64, device=DEVICE)
        if self.found[slot]:
            w1, *second = (t.double() for t in self.found[slot])
            dense = second[0] if len(second) == 1 else second[0] @ second[1]
            change = torch.kron(w1, dense) @ self.x[row].double()
        return self.whole[row, 5:].double() + weight * change


ROWS, SLOT_OF, WEIGHT_OF = [7, 0, 3, 4, 8], [2, 0, 2, 3, 1], [1.0, -0.5, 0.25, 1.0, 1.0]


def make_row_table(capacity: int = 6) -> RowTable:
    table = RowTable(capacity, DEVICE)
    table.load(ROWS, SLOT_OF, WEIGHT_OF)
    return table


def check(case: Hadamard | Kronecker, dtype: torch.dtype) -> None:
    whole = case.add(make_row_table())
    assert torch.equal(whole[:, :5], case.whole[:, :5])
    for row in range(9):
        if row not in ROWS:
            assert torch.equal(whole[row], case.whole[row])
            continue
        i = ROWS.index(row)
        expected = case.exact(row, SLOT_OF[i], WEIGHT_OF[i])
        assert error_ratio(whole[row, 5:], expected) < MAX_ERROR[dtype]


@pytest.mark.parametrize("shape", HADAMARD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard_on_triton(shape, dtype):
    check(Hadamard(shape, dtype), dtype)


@pytest.mark.parametrize("shape", KRONECKER)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kronecker_on_triton(shape, rank, dtype):
    check(Kronecker(shape, rank, dtype), dtype)


def test_an_empty_table_changes_nothing():
    table = make_row_table()
    table.load([], [], [])
    for case in (Hadamard(HADAMARD[1], HALF), Kronecker(KRONECKER[1], 0, HALF)):
        assert torch.equal(case.add(table), case.whole)
