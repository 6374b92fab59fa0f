"""Columns of a product with a quantised weight, for kernels that do more than multiply.

The loop is that of ``nf4_matmul``, whose kernel has it in a form of its own: registers there are
few.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from turret.kernels.gpu.nf4_matmul import add_tile, block_maximum, store_tiles, sum_of_parts
from turret.kernels.gpu.shared.nf4_codes import code_pairs
from turret.kernels.nf4_matmul import BLOCK

_BLOCK = tl.constexpr(BLOCK)
_HALF = tl.constexpr(BLOCK // 2)


@triton.jit
def multiply_columns(
    x_ptr,  # [num_rows, in_features]
    packed_ptr,  # [out_features, in_features / 2] uint8
    code_ptr,  # [16] fp32
    absmax_ptr,  # [out_features, in_features / 64] fp32, or uint8 if nested
    code2_ptr,  # [256] fp32, or None
    absmax2_ptr,  # fp32, or None
    offset_ptr,  # fp32, or None
    to_ptr,  # [num_rows, out_features]
    n,  # [BLOCK_N], the columns
    inside,
    begin,  # quantisation blocks of the columns' inputs
    end,
    num_rows,
    x_stride,
    in_features,
    out_features,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PTX: tl.constexpr,
):
    """Store what some inputs give in some columns."""
    first_block = n * (in_features // _BLOCK)
    half = tl.arange(0, _HALF)
    acc0 = tl.zeros((16, BLOCK_N), dtype=tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for g in range(begin, end):
        block = first_block + g
        absmax = block_maximum(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, inside)
        byte_at = packed_ptr + block[:, None] * _HALF + half[None, :]
        byte = tl.load(byte_at, mask=inside[:, None], other=0)
        even, odd = code_pairs(byte, code_ptr, x_ptr.dtype.element_ty, PTX)
        weight = tl.trans(tl.reshape(tl.join(even, odd), (BLOCK_N, _BLOCK)))
        x_at = x_ptr + g * _BLOCK
        acc0 = add_tile(acc0, x_at, x_stride, 0, num_rows, weight, absmax)
        if TILES > 1:
            acc1 = add_tile(acc1, x_at, x_stride, 16, num_rows, weight, absmax)
        if TILES > 2:
            acc2 = add_tile(acc2, x_at, x_stride, 32, num_rows, weight, absmax)
            acc3 = add_tile(acc3, x_at, x_stride, 48, num_rows, weight, absmax)
    store_tiles(to_ptr, acc0, acc1, acc2, acc3, num_rows, n, inside, out_features, TILES)


@triton.jit
def store_sums(
    y_ptr, parts_ptr, n, inside, num_rows, out_features, ROWS: tl.constexpr, SPLITS: tl.constexpr
):
    """Write some columns of the product from the parts of all programs."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    for first in tl.range(0, num_rows, ROWS, num_stages=1):
        m = first + tl.arange(0, ROWS)
        keep = (m < num_rows)[:, None] & inside[None, :]
        y = sum_of_parts(parts_ptr, m, n, keep, num_rows, out_features, dtype, SPLITS)
        tl.store(y_ptr + m[:, None] * out_features + n[None, :], y.to(dtype), mask=keep)
