"""Triton form of ``circulant``: ``y += w Δ(x)`` per row, in place, without transforms.

    Δ_m,j = Σ_n Σ_i kernel_m,n,(i − j) mod b · x_n,i

A program takes one row and a tile of one block's outputs. A kernel of ``b`` values serves ``b²``
products, so it comes from cache: of memory, the update is as small as it is on disk, and its
products are as many as the base's own for its rows.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.shared.contract import (
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
)
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.gpu.tables.row_table import HEADER, RowTable

_HEADER = tl.constexpr(HEADER)
_BLOCK_I = 32
_BLOCK_J = 64


@triton.jit
def circulant_kernel(
    x_ptr,  # [num_rows, columns * size]
    y_ptr,  # [num_rows, rows * size]
    kernel_ptr,  # [num_slots, rows, columns, size]
    table_ptr,
    x_stride,
    y_stride,
    num_blocks,
    columns,
    size,
    capacity,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    tiles = tl.cdiv(size, BLOCK_J)
    per_row = num_blocks * tiles
    for work in range(tl.program_id(0), tl.load(table_ptr) * per_row, tl.num_programs(0)):
        at = table_ptr + _HEADER + work // per_row
        row = tl.load(at).to(tl.int64)
        slot = tl.load(at + capacity).to(tl.int64)
        weight = tl.load(at + 2 * capacity).to(tl.float32, bitcast=True)
        block = work % per_row // tiles
        j = work % tiles * BLOCK_J + tl.arange(0, BLOCK_J)
        x_row = x_ptr + row * x_stride
        own = kernel_ptr + (slot * num_blocks + block) * columns * size
        total = tl.zeros((BLOCK_J,), dtype=tl.float32)
        for n in range(0, columns):
            for i0 in range(0, size, BLOCK_I):
                i = i0 + tl.arange(0, BLOCK_I)
                x = tl.load(x_row + n * size + i, mask=i < size, other=0.0).to(tl.float32)
                place = i[:, None] - j[None, :]
                place = tl.where(place < 0, place + size, place)
                inside = (i < size)[:, None] & (j < size)[None, :]
                kernel = tl.load(own + n * size + place, mask=inside, other=0.0)
                total += tl.sum(x[:, None] * kernel.to(tl.float32), axis=0)
        y_at = y_ptr + row * y_stride + block * size + j
        base = tl.load(y_at, mask=j < size, other=0.0).to(tl.float32)
        tl.store(y_at, (base + weight * total).to(y_ptr.dtype.element_ty), mask=j < size)


def circulant(x: torch.Tensor, y: torch.Tensor, kernel: torch.Tensor, table: RowTable) -> None:
    """Add the updates of the table's rows in place, one rounding to the dtype of ``y``.

    Args:
        x: Activations of the whole step, ``[num_rows, in]``, fp16, bf16 or fp32; rows may be
            strided.
        y: Base results of one slice, ``[num_rows, out]``, dtype of ``x``; rows may be strided.
        kernel: ``[num_slots, out / b, in / b, b]``, dtype of ``x``, contiguous.
        table: Which rows, with which slots and weights.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("x", x)
    check_float("y", y, x.dtype)
    check_rows("x", x)
    check_rows("y", y)
    check_float("kernel", kernel, x.dtype)
    check_contiguous("kernel", kernel)
    rows, columns, size = kernel.shape[1:]
    check_shape("x", x, -1, columns * size)
    check_shape("y", y, x.shape[0], rows * size)
    circulant_kernel[(tuning(x.device).programs,)](
        x,
        y,
        kernel,
        table.buffer,
        x.stride(0),
        y.stride(0),
        rows,
        columns,
        size,
        table.capacity,
        BLOCK_I=_BLOCK_I,
        BLOCK_J=_BLOCK_J,
        num_warps=4,
        enable_fp_fusion=True,
    )
