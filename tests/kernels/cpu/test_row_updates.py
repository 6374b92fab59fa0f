"""The compiled updates of rows, compared with float64 and with each row alone.

Each of these faults was planted in the C code once. The number of tests that failed is in
parentheses.

- Hadamard: the weight ignored (18; 10 if only in the last columns), the last columns (10) or inputs
  (4) skipped, u transposed (16), ranks beyond a multiple of four dropped (12).
- Kronecker: the weight ignored (18), half of the columns of X w2ᵀ not written (6), one row of X
  used for four (2) or one of w1 for all (8), ranks beyond sixteen (4) or beyond a multiple of four
  (6) dropped, narrow factors skipped (4), activations written over those of Hadamard (18).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kernel_traffic import MAX_ERROR, error_ratio
from torch import Tensor

from turret.kernels.cpu import native, row_adapters
from turret.kernels.cpu.row_adapters import (
    CStruct,
    ModuleSizes,
    ModuleTable,
    ProjectionShape,
    RowAdapters,
    RowSegment,
    blocks_bytes,
)

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")

# Entries of a module's table, and the update as a dense matrix in float64.
Update = tuple[list[CStruct], Tensor]
Mix = Sequence[tuple[int, float]]
# One row, a row beside it, and more rows than a tile: some end within a tile.
SEGMENTS: list[tuple[int, int, Mix]] = [
    (0, 1, [(0, 1.0)]),
    (1, 2, [(1, 1.0)]),
    (3, 43, [(2, -0.5), (1, 2.0)]),
    (43, 44, [(3, 1.0), (0, 0.25), (1, 1.0)]),
]
NUM_ROWS, OTHER = 45, 40


def factor(*shape: int) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.25).bfloat16()


def low_rank(inner: int, out: int, rank: int) -> Update:
    a, b = factor(rank, inner), factor(rank, out)
    return [row_adapters.low_rank(a, b)], b.T.double() @ a.double()


def hadamard(inner: int, out: int, rank: int) -> Update:
    w1a, w1b, w2a, w2b = (factor(rank, width) for width in (out, inner) * 2)
    delta = (w1a.T.double() @ w1b.double()) * (w2a.T.double() @ w2b.double())
    return [row_adapters.hadamard(w1a, w1b, w2a, w2b)], delta


def kronecker(shape: tuple[int, int, int, int], rank: int) -> Update:
    """An update of (out_l, in_m, out_k, in_n); the second factor is dense if ``rank`` is 0."""
    out_l, in_m, out_k, in_n = shape
    w1 = factor(out_l, in_m)
    if not rank:
        w2 = factor(in_n, out_k)
        dense = torch.kron(w1.double(), w2.T.double().contiguous())
        return [row_adapters.kronecker(w1, w2)], dense
    a, b = factor(rank, in_n), factor(rank, out_k)
    dense = torch.kron(w1.double(), b.T.double() @ a.double())
    return [row_adapters.kronecker(w1, a, b)], dense


def whole(inner: int, out: int) -> Update:
    weight = torch.randn(out, inner).div_(inner**0.5).bfloat16()
    return [row_adapters.dense(weight)], weight.double()


def entries(inner: int, out: int, count: int, slot: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random entries: some rows have many, some inputs occur twice; in any order in odd slots."""
    rows = (torch.rand(count) ** (1 + slot) * out).long().sort().values
    places = torch.randint(0, inner, (count,))
    if slot % 2 == 0:
        places = (rows * inner + places).sort().values % inner
    starts = torch.searchsorted(rows, torch.arange(out + 1)).to(torch.int32)
    values = torch.randn(count).div_(max(1, count / out) ** 0.5).bfloat16()
    return values, places.to(torch.uint16), starts


def sparse(inner: int, out: int, count: int, slot: int) -> Update:
    values, columns, starts = entries(inner, out, count, slot)
    dense = torch.zeros(out, inner, dtype=torch.float64)
    places = torch.repeat_interleave(starts.long().diff()), columns.long()
    dense.index_put_(places, values.double(), accumulate=True)
    return [row_adapters.sparse(values, columns, starts)], dense


def both(*updates: Update) -> Update:
    entries = [entry for entries, _ in updates for entry in entries]
    return entries, sum((delta for _, delta in updates), torch.zeros(()))


# Inputs, outputs, the rank of a Hadamard update, and the shape and rank of a Kronecker update.
PRODUCTS = [
    (96, 130, 1, (13, 4, 10, 24), 0),
    (96, 130, 3, (13, 4, 10, 24), 3),
    (96, 200, 4, (2, 6, 100, 16), 0),
    (96, 200, 5, (2, 6, 100, 16), 9),
    (96, 576, 8, (24, 8, 24, 12), 0),
    (96, 576, 17, (24, 8, 24, 12), 4),
    (75, 81, 6, (3, 5, 27, 15), 0),
    (75, 81, 2, (3, 5, 27, 15), 17),
    (64, 300, 16, (1, 1, 300, 64), 20),
]
# Inputs and outputs: multiples of a tile, or not; more outputs than a unit of the C kernel.
DENSE = [(64, 32), (96, 70), (43, 33), (1, 5), (200, 150)]
# Inputs, outputs, entries; also a whole row of entries, or no entries.
SPARSE = [
    *((40, 24, 0), (40, 24, 1), (56, 70, 300), (300, 33, 900), (1, 5, 3), (200, 90, 7000)),
    *((3000, 300, 40), (3000, 150, 5000)),
]


def check(inner: int, out: int, updates: Sequence[Update]) -> None:
    """Compare the rows of a step, in the second layer and the first slice of a projection."""
    tables = []
    for parts, _ in updates:
        table = ModuleTable(4)
        table.put(2, *parts)
        table.close()
        tables.append(table)

    def adapt(x: Tensor, y: Tensor, segments: Sequence[tuple[int, int, Mix]]) -> Tensor:
        rows = [RowSegment(a, b, [(tables[k], w) for k, w in mix]) for a, b, mix in segments]
        sizes = ModuleSizes([(inner, out), (inner, OTHER)], 2)
        RowAdapters(rows, 3, sizes).adapt(ProjectionShape(inner, (out, OTHER), 2), x, y, None)
        return y

    # Memory after every row must not be read.
    x = torch.full((NUM_ROWS, inner + 64), float("nan")).bfloat16()[:, :inner]
    x.copy_(torch.randn(NUM_ROWS, inner))
    y = torch.randn(NUM_ROWS, out + OTHER).bfloat16()
    got = adapt(x, y.clone(), SEGMENTS)
    touched = set()
    for start, end, mix in SEGMENTS:
        for row in range(start, end):
            touched.add(row)
            exact = y[row].double()
            for k, weight in mix:
                exact[:out] += weight * (updates[k][1] @ x[row].double())
            assert error_ratio(got[row, :out], exact[:out]) < MAX_ERROR[torch.bfloat16], (row, mix)
            alone = adapt(x[row : row + 1], y[row : row + 1].clone(), [(0, 1, mix)])
            assert torch.equal(alone[0], got[row]), (row, mix)
    others = [row for row in range(NUM_ROWS) if row not in touched]
    assert torch.equal(got[others], y[others])
    assert torch.equal(got[:, out:], y[:, out:])


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("inner", "out", "rank", "shape", "second"), PRODUCTS)
def test_products_of_factors(
    inner: int, out: int, rank: int, shape: tuple[int, int, int, int], second: int
) -> None:
    torch.manual_seed(rank)
    made = both(hadamard(inner, out, rank), kronecker(shape, second), low_rank(inner, out, rank))
    mixed = both(low_rank(inner, out, rank), hadamard(inner, out, rank))
    check(inner, out, [mixed, kronecker(shape, second), made, low_rank(inner, out, rank)])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("inner", "out"), DENSE)
def test_whole_matrices(inner: int, out: int) -> None:
    check(inner, out, [whole(inner, out) for _ in range(4)])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("inner", "out", "count"), SPARSE)
def test_entries(inner: int, out: int, count: int) -> None:
    check(inner, out, [sparse(inner, out, count, slot) for slot in range(4)])


@pytest.mark.parametrize(("inner", "out", "count"), SPARSE)
def test_the_size_of_a_copy_is_known_beforehand(inner: int, out: int, count: int) -> None:
    for slot in range(4):
        parts = entries(inner, out, count, slot)
        *made, _ = row_adapters.sparse(*parts).values
        tensors = [tensor for tensor in made if isinstance(tensor, Tensor)]
        assert blocks_bytes(*parts[1:]) == sum(tensor.nbytes for tensor in tensors)
