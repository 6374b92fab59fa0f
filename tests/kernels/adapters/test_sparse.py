"""Sparse updates: compiled kernels compared with float64, and with each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_traffic import DEVICE, MAX_ERROR, error_ratio

from turret.kernels.cpu import native
from turret.kernels.cpu.row_adapters import (
    ModuleSizes,
    ModuleTable,
    ProjectionShape,
    RowAdapters,
    RowSegment,
    SparseBlocks,
    blocks_bytes,
)

NATIVE = pytest.mark.skipif(
    native.library() is None or DEVICE.type != "cpu", reason="compiled for the processor"
)
SLOTS = 4
# Inputs, outputs, entries; also a whole row of entries, or no entries.
SHAPES = [
    *((40, 24, 0), (40, 24, 1), (56, 70, 300), (300, 33, 900), (1, 5, 3), (200, 90, 7000)),
    *((3000, 300, 40), (3000, 150, 5000)),
]


class Case:
    """Random entries of some adapters, inputs, base results; the slice is part of a fused one."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.inner, self.out, count = shape
        self.parts = [self._entries(count, slot, dtype) for slot in range(SLOTS)]
        # Memory after every row must not be read.
        wide = torch.full((9, self.inner + 64), float("nan"), device=DEVICE, dtype=dtype)
        self.x = wide[:, : self.inner].copy_(torch.randn(9, self.inner))
        self.whole = torch.randn(9, 5 + self.out).to(DEVICE, dtype)

    def _entries(self, count: int, slot: int, dtype: torch.dtype) -> Any:
        # Some rows have many entries, some inputs occur twice, and in some slots, the order is
        # arbitrary.
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
