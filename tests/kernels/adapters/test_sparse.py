"""Sparse updates: reference and compiled kernels against float64, and each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_traffic import DEVICE, DTYPES, HALF, MAX_ERROR, error_ratio

from turret.kernels.adapters.sparse import Jagged, sparse_reference
from turret.kernels.cpu import native
from turret.kernels.cpu.row_adapters import (
    ModuleSizes,
    ModuleTable,
    ProjectionShape,
    RowAdapters,
    RowSegment,
)
from turret.kernels.cpu.sparse import SparseBlocks, blocks_bytes
from turret.kernels.gpu.adapters.sparse import sparse
from turret.kernels.gpu.tables.row_table import RowTable

NATIVE = pytest.mark.skipif(
    native.library() is None or DEVICE.type != "cpu", reason="compiled for the processor"
)
SLOTS = 4
# Inputs, outputs, entries; a whole row of entries, or none at all.
SHAPES = [
    *((40, 24, 0), (40, 24, 1), (56, 70, 300), (300, 33, 900), (1, 5, 3), (200, 90, 7000)),
    *((3000, 300, 40), (3000, 150, 5000)),
]
ROWS, SLOT_OF, WEIGHT_OF = [7, 0, 3, 4], [2, 0, 2, 3], [1.0, -0.5, 0.25, 1.0]


class Case:
    """Random entries of some adapters, inputs, base results; the slice is part of a fused one."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.inner, self.out, count = shape
        self.parts = [self._entries(count, slot, dtype) for slot in range(SLOTS)]
        # Behind every row lies what must not be read.
        wide = torch.full((9, self.inner + 64), float("nan"), device=DEVICE, dtype=dtype)
        self.x = wide[:, : self.inner].copy_(torch.randn(9, self.inner))
        self.whole = torch.randn(9, 5 + self.out).to(DEVICE, dtype)

    def _entries(self, count: int, slot: int, dtype: torch.dtype) -> Any:
        # Some rows have many entries, some inputs come twice, and of some slots in any order.
        rows = (torch.rand(count) ** (1 + slot) * self.out).long().sort().values
        places = torch.randint(0, self.inner, (count,))
        if slot % 2 == 0:
            places = (rows * self.inner + places).sort().values % self.inner
        columns = places.to(torch.uint16)
        starts = torch.searchsorted(rows, torch.arange(self.out + 1)).to(torch.int32)
        values = torch.randn(count).div_(max(1, count / self.out) ** 0.5).to(dtype)
        return tuple(part.to(DEVICE) for part in (values, columns, starts))

    def exact(self, row: int, slot: int, weight: float) -> torch.Tensor:
        values, columns, starts = self.parts[slot]
        terms = values.double() * self.x[row, columns.long()].double()
        outputs = torch.repeat_interleave(starts.long().diff())
        return (self.whole[row, 5:].double()).index_add_(0, outputs, weight * terms)

    def heap(self) -> tuple[torch.Tensor, ...]:
        """The slots' entries in one list, out of order and with gaps."""
        sizes, order = [len(values) for values, _, _ in self.parts], (2, 0, 3, 1)
        firsts, at = [0] * SLOTS, 3
        for slot in order:
            firsts[slot], at = at, at + sizes[slot] + 5
        values = torch.full((at,), float("nan"), dtype=self.whole.dtype, device=DEVICE)
        columns = torch.full((at,), 65535, dtype=torch.int32).to(torch.uint16).to(DEVICE)
        for slot, (mine, places, _) in enumerate(self.parts):
            those = slice(firsts[slot], firsts[slot] + sizes[slot])
            values[those], columns[those] = mine, places
        starts = torch.stack([starts for _, _, starts in self.parts])
        return values, columns, starts, torch.tensor(firsts, device=DEVICE)


def row_table() -> RowTable:
    table = RowTable(6, DEVICE)
    table.load(ROWS, SLOT_OF, WEIGHT_OF)
    return table


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_against_float64_and_the_rows_alone(shape, dtype):
    case = Case(shape, dtype)
    for slot in range(SLOTS):
        entries = Jagged.of(*case.parts[slot])
        weights = torch.linspace(-1, 1, 9)[:, None].to(DEVICE)
        whole = case.whole.clone()
        sparse_reference(case.x, whole[:, 5:], entries, weights)
        assert torch.equal(whole[:, :5], case.whole[:, :5])
        for row in range(9):
            expected = case.exact(row, slot, float(weights[row]))
            assert error_ratio(whole[row, 5:], expected) < MAX_ERROR[dtype]
            alone = case.whole[row : row + 1, 5:].clone()
            sparse_reference(case.x[row : row + 1], alone, entries, float(weights[row]))
            assert torch.equal(alone[0], whole[row, 5:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_triton(shape, dtype):
    case = Case(shape, dtype)
    whole = case.whole.clone()
    values, columns, starts, firsts = case.heap()
    sparse(case.x, whole[:, 5:], values, columns, starts, firsts, row_table())
    assert torch.equal(whole[:, :5], case.whole[:, :5])
    for row in range(9):
        if row not in ROWS:
            assert torch.equal(whole[row], case.whole[row])
            continue
        i = ROWS.index(row)
        expected = case.exact(row, SLOT_OF[i], WEIGHT_OF[i])
        assert error_ratio(whole[row, 5:], expected) < MAX_ERROR[dtype]


def test_an_empty_table_changes_nothing_and_breaches_are_refused():
    case, table = Case(SHAPES[2], HALF), row_table()
    values, columns, starts, firsts = case.heap()
    whole = case.whole.clone()
    table.load([], [], [])
    sparse(case.x, whole[:, 5:], values, columns, starts, firsts, table)
    assert torch.equal(whole, case.whole)
    y = whole[:, 5:]
    for wrong, message in (
        ((values.float(), columns, starts, firsts), "values"),
        ((values, columns[1:], starts, firsts), "columns"),
        ((values, columns.to(torch.int32), starts, firsts), "columns"),
        ((values, columns, starts[:, 1:], firsts), "row_starts"),
        ((values, columns, starts, firsts[1:]), "firsts"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse(case.x, y, *wrong, table)


@NATIVE
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_compiled_rows_equal_float64_and_the_rows_alone(shape, num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    case = Case(shape, torch.bfloat16)
    tables = []
    for parts in case.parts:
        table = ModuleTable(1)
        table.put(0, sparse=SparseBlocks.of(*parts))
        table.close()
        tables.append(table)

    def adapt(x: torch.Tensor, y: torch.Tensor, segments: Any) -> None:
        rows = [RowSegment(a, b, [(tables[slot], w) for slot, w in mix]) for a, b, mix in segments]
        sizes = ModuleSizes([(case.inner, case.out)], 1)
        shape = ProjectionShape(case.inner, (case.out,), 0)
        RowAdapters(rows, 1, sizes).adapt(shape, x, y, None)

    segments = [(0, 1, [(0, 1.0)]), (2, 8, [(2, -0.5), (1, 2.0)]), (8, 9, [(3, 1.0)])]
    y = case.whole[:, 5:].clone()
    adapt(case.x, y, segments)
    assert torch.equal(y[1], case.whole[1, 5:])
    for start, end, mix in segments:
        for row in range(start, end):
            base = case.whole[row, 5:].double()
            expected = base + sum(case.exact(row, slot, w) - base for slot, w in mix)
            assert error_ratio(y[row], expected) < MAX_ERROR[torch.bfloat16]
            alone = case.whole[row : row + 1, 5:].clone()
            adapt(case.x[row : row + 1], alone, [(0, 1, mix)])
            assert torch.equal(alone[0], y[row])
    torch.set_num_threads(before)


@NATIVE
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bytes_of_a_copy_are_known_before_it_is_made(shape):
    for parts in Case(shape, torch.bfloat16).parts:
        made = SparseBlocks.of(*parts).parts
        assert blocks_bytes(*parts[1:]) == sum(tensor.nbytes for tensor in made)
