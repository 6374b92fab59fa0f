"""Hadamard and Kronecker kernels compared with float64.

Each of these faults was planted once and made tests fail: every part begins at 0, ranks past r
are read, x is dropped, only the first part is used, the weight is dropped, the output order is
swapped, x is read past in_n.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from builders.operators import Make, delta_of, hadamard, kronecker
from kernel_traffic import DEVICE, DTYPES, MAX_ERROR, error_ratio
from ptx.addresses import address_of

from turret.kernels.gpu import hadamard as hadamard_kernels
from turret.kernels.gpu.kronecker import kronecker as kronecker_kernel
from turret.kernels.gpu.tables import RowTable

SLOTS, NUM_ROWS = 4, 9
# The rank of the factors, the input width and the output width.
HADAMARD = [(1, 40, 24), (3, 100, 70), (16, 72, 50), (20, 90, 17)]
# out_l, in_m, out_k, in_n.
KRONECKER = [
    *((1, 1, 40, 56), (2, 3, 24, 3), (4, 4, 50, 40), (24, 24, 24, 24), (8, 16, 5, 36)),
    (3, 48, 70, 2),
]
ROWS, SLOT_OF, WEIGHT_OF = [7, 0, 3, 4, 8], [2, 0, 2, 3, 1], [1.0, -0.5, 0.25, 1.0, 1.0]
# A function that adds updates, given by their factors' addresses, to a slice of a fused projection.
Add = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, RowTable], None]


def make_row_table(rows: list[int] = ROWS) -> RowTable:
    table = RowTable(6, DEVICE)
    table.load(rows, SLOT_OF[: len(rows)], WEIGHT_OF[: len(rows)])
    return table


def check(make: Make, out: int, inner: int, dtype: torch.dtype, add: Add) -> None:
    """Compare rows with float64; slot 1 has no factors."""
    operators = [make(out, inner, dtype) for _ in range(SLOTS)]
    factors = [[tensor.to(DEVICE) for tensor in each.tensors()] for each in operators]
    addresses = torch.tensor([[address_of(t) for t in own] for own in factors], device=DEVICE)
    addresses[1] = 0
    # Memory after every row must not be read.
    wide = torch.full((NUM_ROWS, inner + 64), float("nan"), device=DEVICE, dtype=dtype)
    x = wide[:, :inner].copy_(torch.randn(NUM_ROWS, inner))
    before = torch.randn(NUM_ROWS, 5 + out).to(DEVICE, dtype)
    empty, whole = before.clone(), before.clone()
    add(x, empty[:, 5:], addresses, make_row_table([]))
    assert torch.equal(empty, before)
    add(x, whole[:, 5:], addresses, make_row_table())
    assert torch.equal(whole[:, :5], before[:, :5])
    for row in range(NUM_ROWS):
        exact = before[row, 5:].double()
        if row in ROWS and SLOT_OF[ROWS.index(row)] != 1:
            i = ROWS.index(row)
            delta = delta_of(operators[SLOT_OF[i]], torch.zeros(out, inner).double()).to(DEVICE)
            exact = exact + WEIGHT_OF[i] * (delta @ x[row].double())
        assert error_ratio(whole[row, 5:], exact) < MAX_ERROR[dtype]


@pytest.mark.parametrize("shape", HADAMARD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard_on_triton(shape, dtype):
    rank, inner, out = shape

    def add(x, y, addresses, table):
        u = hadamard_kernels.hadamard_shrink(x, addresses, rank, table)
        hadamard_kernels.hadamard_expand(y, u, addresses, table)

    check(hadamard(rank), out, inner, dtype, add)


@pytest.mark.parametrize("shape", KRONECKER)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kronecker_on_triton(shape, rank, dtype):
    out_l, in_m, out_k, in_n = shape
    second = [(out_k, rank), (rank, in_n)] if rank else [(out_k, in_n)]

    def add(x, y, addresses, table):
        kronecker_kernel(x, y, addresses, [(out_l, in_m), *second], table)

    check(kronecker(out_l, in_m, rank), out_l * out_k, in_m * in_n, dtype, add)
