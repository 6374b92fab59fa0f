"""Dense updates: reference and compiled kernels against float64, and each row alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from kernel_traffic import DEVICE, DTYPES, HALF, MAX_ERROR, error_ratio
from ptx.addresses import address_of

from turret.kernels.adapters.dense import dense_reference
from turret.kernels.cpu import native
from turret.kernels.cpu.row_adapters import (
    ModuleSizes,
    ModuleTable,
    ProjectionShape,
    RowAdapters,
    RowSegment,
)
from turret.kernels.gpu.adapters.dense import dense
from turret.kernels.gpu.tables.row_table import RowTable

NATIVE = pytest.mark.skipif(
    native.library() is None or DEVICE.type != "cpu", reason="compiled for the processor"
)
SLOTS = 4
# Inputs, outputs: multiples of a tile, and neither; more outputs than a unit of the C kernel has.
SHAPES = [(64, 32), (96, 70), (43, 33), (1, 5), (200, 150)]
# 70 rows are more than a tile of the Triton kernel has; slots mixed and repeated, -1 without.
MANY = [(3 * i % 7) % SLOTS for i in range(70)]
Mix = Sequence[tuple[int, float]]


class Case:
    """Random matrices of some adapters, inputs, base results; the slice is part of a fused one."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, rows: int = 9) -> None:
        self.inner, self.out = shape
        self.parts = [
            torch.randn(self.out, self.inner).div_(self.inner**0.5).to(DEVICE, dtype)
            for _ in range(SLOTS)
        ]
        # Behind every row lies what must not be read.
        wide = torch.full((rows, self.inner + 64), float("nan"), device=DEVICE, dtype=dtype)
        self.x = wide[:, : self.inner].copy_(torch.randn(rows, self.inner))
        self.whole = torch.randn(rows, 5 + self.out).to(DEVICE, dtype)

    def exact(self, row: int, mix: Mix) -> torch.Tensor:
        changes = [w * (self.parts[slot].double() @ self.x[row].double()) for slot, w in mix]
        return self.whole[row, 5:].double() + sum(changes)

    def addresses(self) -> torch.Tensor:
        return torch.tensor([address_of(part) for part in self.parts], device=DEVICE)


def row_table(rows: Sequence[int], slots: Sequence[int], weights: Sequence[float]) -> RowTable:
    table = RowTable(80, DEVICE)
    table.load(rows, slots, weights)
    return table


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_against_float64_and_the_rows_alone(shape, dtype):
    case = Case(shape, dtype)
    for slot, weight in enumerate(case.parts):
        found = dense_reference(case.x, weight)
        for row in range(9):
            expected = case.parts[slot].double() @ case.x[row].double()
            assert error_ratio(found[row], expected) < MAX_ERROR[dtype]
            assert torch.equal(dense_reference(case.x[row : row + 1], weight)[0], found[row])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_triton(shape, dtype):
    case = Case(shape, dtype)
    rows, slots, weights = [7, 0, 3, 4], [2, 0, 2, 3], [1.0, -0.5, 0.25, 1.0]
    addresses = case.addresses()
    # The adapter in slot 3 leaves this module as it is.
    addresses[3] = 0
    whole = case.whole.clone()
    dense(case.x, whole[:, 5:], addresses, row_table(rows, slots, weights))
    assert torch.equal(whole[:, :5], case.whole[:, :5])
    for row in range(9):
        if row not in rows or slots[rows.index(row)] == 3:
            assert torch.equal(whole[row], case.whole[row])
            continue
        i = rows.index(row)
        expected = case.exact(row, [(slots[i], weights[i])])
        assert error_ratio(whole[row, 5:], expected) < MAX_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_triton_a_row_among_many_has_the_bits_that_it_has_alone(dtype):
    case = Case(SHAPES[1], dtype, len(MANY))
    together, rows = case.whole.clone(), range(len(MANY))
    table = row_table(rows, MANY, [0.5] * len(MANY))
    dense(case.x, together[:, 5:], case.addresses(), table)
    for row in (0, 1, 17, 63, 64, 69):
        expected = case.exact(row, [(MANY[row], 0.5)])
        assert error_ratio(together[row, 5:], expected) < MAX_ERROR[dtype]
        alone = case.whole.clone()
        dense(case.x, alone[:, 5:], case.addresses(), row_table([row], [MANY[row]], [0.5]))
        assert torch.equal(alone[row], together[row])


def test_an_empty_table_changes_nothing_and_breaches_are_refused():
    case = Case(SHAPES[1], HALF)
    whole, table = case.whole.clone(), row_table([], [], [])
    dense(case.x, whole[:, 5:], case.addresses(), table)
    assert torch.equal(whole, case.whole)
    y, addresses = whole[:, 5:], case.addresses()
    for x, result, wrong, message in (
        (case.x, y.float(), addresses, "y"),
        (case.x, y[1:], addresses, "y"),
        (case.x, y, addresses.float(), "weights"),
        (case.x, y, addresses[None], "weights"),
        (case.x, y, addresses[::2], "weights"),
    ):
        with pytest.raises(ValueError, match=message):
            dense(x, result, wrong, table)


@NATIVE
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_compiled_rows_equal_float64_and_the_rows_alone(shape, num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    case = Case(shape, torch.bfloat16)
    tables = []
    for weight in case.parts:
        table = ModuleTable(1)
        table.put(0, dense=weight)
        table.close()
        tables.append(table)

    def adapt(x: torch.Tensor, y: torch.Tensor, segments: Sequence[tuple[int, int, Mix]]) -> None:
        rows = [RowSegment(a, b, [(tables[slot], w) for slot, w in mix]) for a, b, mix in segments]
        sizes = ModuleSizes([(case.inner, case.out)], 1)
        shape = ProjectionShape(case.inner, (case.out,), 0)
        RowAdapters(rows, 1, sizes).adapt(shape, x, y, None)

    # Six rows are a tile and two alone.
    segments: list[tuple[int, int, Mix]] = [
        (0, 1, [(0, 1.0)]),
        (2, 8, [(2, -0.5), (1, 2.0)]),
        (8, 9, [(3, 1.0)]),
    ]
    y = case.whole[:, 5:].clone()
    adapt(case.x, y, segments)
    assert torch.equal(y[1], case.whole[1, 5:])
    for start, end, mix in segments:
        for row in range(start, end):
            assert error_ratio(y[row], case.exact(row, mix)) < MAX_ERROR[torch.bfloat16]
            alone = case.whole[row : row + 1, 5:].clone()
            adapt(case.x[row : row + 1], alone, [(0, 1, mix)])
            assert torch.equal(alone[0], y[row])
    torch.set_num_threads(before)
