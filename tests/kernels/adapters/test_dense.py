"""Dense updates: compiled kernels compared with float64, and with each row alone."""

from __future__ import annotations

from collections.abc import Sequence

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
)

NATIVE = pytest.mark.skipif(
    native.library() is None or DEVICE.type != "cpu", reason="compiled for the processor"
)
SLOTS = 4
# Inputs and outputs: multiples of a tile, or not; more outputs than a unit of the C kernel.
SHAPES = [(64, 32), (96, 70), (43, 33), (1, 5), (200, 150)]
Mix = Sequence[tuple[int, float]]


class Case:
    """Random matrices of some adapters, inputs, base results; the slice is part of a fused one."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, rows: int = 9) -> None:
        self.inner, self.out = shape
        self.parts = [
            torch.randn(self.out, self.inner).div_(self.inner**0.5).to(DEVICE, dtype)
            for _ in range(SLOTS)
        ]
        # Memory after every row must not be read.
        wide = torch.full((rows, self.inner + 64), float("nan"), device=DEVICE, dtype=dtype)
        self.x = wide[:, : self.inner].copy_(torch.randn(rows, self.inner))
        self.whole = torch.randn(rows, 5 + self.out).to(DEVICE, dtype)

    def exact(self, row: int, mix: Mix) -> torch.Tensor:
        changes = [w * (self.parts[slot].double() @ self.x[row].double()) for slot, w in mix]
        return self.whole[row, 5:].double() + sum(changes)


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
