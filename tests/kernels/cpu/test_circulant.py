"""Block-circulant updates on a CPU, with blocks that are transformed in parts or as a whole."""

from __future__ import annotations

import pytest
import torch
from kernel_traffic import circulant, error_ratio

from turret.kernels.cpu import row_adapters
from turret.kernels.cpu.native import library
from turret.kernels.cpu.row_adapters import (
    ModuleSizes,
    ModuleTable,
    ProjectionShape,
    RowAdapters,
    RowSegment,
)

ROWS = 5
pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")
# The numbers of blocks of outputs and inputs, and the size of a block: with one part and many, with
# frequencies in one vector and in more than four, and with sizes without parts.
SHAPES = [(3, 2, 16), (2, 3, 48), (1, 2, 80), (2, 1, 128), (3, 8, 192), (2, 2, 256)]
SHAPES += [(1, 1, 272), (5, 3, 24), (7, 9, 1), (2, 2, 150)]


def applied(kernel: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The results of rows that share the update, each a segment; ``[rows, out]`` bf16."""
    rows, columns, size = kernel.shape
    table = ModuleTable(1)
    table.put(0, row_adapters.circulant(kernel))
    table.close()
    segments = [RowSegment(row, row + 1, [(table, 1.0)]) for row in range(len(x))]
    sizes = ModuleSizes([(columns * size, rows * size)], 1)
    y = torch.zeros(len(x), rows * size, dtype=torch.bfloat16)
    RowAdapters(segments, 1, sizes).adapt(
        ProjectionShape(columns * size, [rows * size], 0), x, y, None
    )
    return y


@pytest.mark.parametrize("shape", SHAPES)
def test_circulant_blocks_match_the_dense_matrix(shape: tuple[int, int, int]) -> None:
    _, columns, size = shape
    *_, parts = row_adapters.circulant(torch.zeros(shape)).values
    assert parts == (0 if size % 16 else size // 16)
    kernel = torch.randn(shape) / (columns * size) ** 0.5
    x = torch.randn(ROWS, columns * size).bfloat16()
    found = applied(kernel, x)
    exact = x.double() @ circulant(kernel.double()).T
    # The error of the result's own rounding is at most 2⁻⁹.
    assert error_ratio(found, exact) < 2.2e-3
    for row in range(ROWS):
        assert torch.equal(applied(kernel, x[row : row + 1])[0], found[row])


@pytest.mark.parametrize("size", [16, 64, 192, 256])
def test_transforms_are_exact_to_fp32(size: int) -> None:
    """One nonzero input and a kernel of small integers give results that are exact in bf16."""
    kernel = torch.randint(-8, 8, (2, 2, size)).float()
    for place in (0, 1, size - 1, size, 2 * size - 1):
        x = torch.zeros(1, 2 * size, dtype=torch.bfloat16)
        x[0, place] = 1.0
        error = applied(kernel, x)[0].float() - circulant(kernel)[:, place]
        assert error.abs().max() < 1e-5, place
