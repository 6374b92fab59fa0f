"""Triton form of ``nf4_matmul``: multiply by the codes in registers, for 1 to 64 rows.

Bound by the half byte per weight, so by how few instructions a weight takes. A program takes a tile
of output columns and walks the input features by quantisation block: one product of the rows with
the block's sixteen-valued codes on tensor cores, times the block's maximum in fp32. Up to four
tiles of 16 rows share the decoded codes. Every row goes through the same tensor-core instruction in
the same order, so its bits do not depend on how many rows there are.

Where a weight has few columns, the input features are cut into parts at fixed places that depend on
the weight's shape alone; a second kernel adds the parts in their order.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.contract import (
    check_contiguous,
    check_float,
    check_length,
    check_rows,
    check_shape,
)
from turret.kernels.gpu.dots import dot
from turret.kernels.gpu.nf4_codes import code_on, code_pairs
from turret.kernels.gpu.tuning import Tuning, tuning
from turret.kernels.nf4_matmul import BLOCK, GROUP, Nf4Matrix

MAX_ROWS = 64
_SUM_BLOCK = 512
_BLOCK = tl.constexpr(BLOCK)
_HALF = tl.constexpr(BLOCK // 2)
_GROUP = tl.constexpr(GROUP)


@triton.jit
def _block_maximum(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, keep):
    """Maxima of blocks, fp32, zero where not ``keep``."""
    absmax = tl.load(absmax_ptr + block, mask=keep, other=0)
    if code2_ptr is not None:
        scale2 = tl.load(absmax2_ptr + block // _GROUP, mask=keep, other=0.0)
        offset = tl.load(offset_ptr + block // _GROUP, mask=keep, other=0.0)
        absmax = tl.load(code2_ptr + absmax.to(tl.int32)) * scale2 + offset
    return absmax


@triton.jit
def _add_tile(acc, x_ptr, x_stride, first_row, num_rows, weight, absmax):
    """Add a block of 64 inputs of 16 rows: the product with the codes, times the maxima."""
    m = first_row + tl.arange(0, 16)
    x_at = x_ptr + m[:, None] * x_stride + tl.arange(0, _BLOCK)[None, :]
    x = tl.load(x_at, mask=(m < num_rows)[:, None], other=0.0)
    product = dot(x, weight, tl.zeros(acc.shape, dtype=tl.float32))
    return acc + product * absmax[None, :]


@triton.jit
def _store_tile(y_ptr, acc, first_row, num_rows, n, out_features):
    m = first_row + tl.arange(0, 16)
    y_at = y_ptr + m[:, None] * out_features + n[None, :]
    keep = (m < num_rows)[:, None] & (n < out_features)[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=keep)


# One compiled form for every number of rows of the same number of tiles.
@triton.jit(do_not_specialize=["num_rows", "part_blocks"])
def nf4_matmul_kernel(
    x_ptr,  # [num_rows, in_features]
    packed_ptr,  # [out_features, in_features / 2] uint8
    code_ptr,  # [16] fp32
    absmax_ptr,  # [out_features, in_features / 64] fp32, or uint8 if nested
    code2_ptr,  # [256] fp32, or None
    absmax2_ptr,  # fp32, or None
    offset_ptr,  # fp32, or None
    y_ptr,  # [num_rows, out_features]; or fp32 parts, [splits, num_rows, out_features]
    num_rows,
    x_stride,
    in_features,
    out_features,
    part_blocks,  # quantisation blocks of a program
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PTX: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < out_features
    split = tl.program_id(1)
    blocks = in_features // _BLOCK
    first_block = n * blocks
    half = tl.arange(0, _HALF)
    begin = split * part_blocks
    end = tl.minimum(begin + part_blocks, blocks)
    acc0 = tl.zeros((16, BLOCK_N), dtype=tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for g in range(begin, end):
        block = first_block + g
        absmax = _block_maximum(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, inside_n)
        byte_at = packed_ptr + block[:, None] * _HALF + half[None, :]
        byte = tl.load(byte_at, mask=inside_n[:, None], other=0)
        even, odd = code_pairs(byte, code_ptr, x_ptr.dtype.element_ty, PTX)
        weight = tl.trans(tl.reshape(tl.join(even, odd), (BLOCK_N, _BLOCK)))
        x_at = x_ptr + g * _BLOCK
        acc0 = _add_tile(acc0, x_at, x_stride, 0, num_rows, weight, absmax)
        if TILES > 1:
            acc1 = _add_tile(acc1, x_at, x_stride, 16, num_rows, weight, absmax)
        if TILES > 2:
            acc2 = _add_tile(acc2, x_at, x_stride, 32, num_rows, weight, absmax)
            acc3 = _add_tile(acc3, x_at, x_stride, 48, num_rows, weight, absmax)
    y_ptr += split.to(tl.int64) * num_rows * out_features
    _store_tile(y_ptr, acc0, 0, num_rows, n, out_features)
    if TILES > 1:
        _store_tile(y_ptr, acc1, 16, num_rows, n, out_features)
    if TILES > 2:
        _store_tile(y_ptr, acc2, 32, num_rows, n, out_features)
        _store_tile(y_ptr, acc3, 48, num_rows, n, out_features)


@triton.jit(do_not_specialize=["count"])
def nf4_sum_kernel(
    parts_ptr,  # [PARTS, count] fp32
    y_ptr,  # [count]
    count,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(parts_ptr + at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts_ptr + part * count + at, mask=inside, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)


def nf4_matmul(x: torch.Tensor, weight: Nf4Matrix) -> torch.Tensor:
    """Multiply by a quantised weight without writing it out.

    Args:
        x: ``[num_rows, in_features]``, 1 to 64 rows, fp16, bf16 or fp32; rows may be strided.
        weight: The weight; its tensors contiguous, on the device of ``x``.

    Returns:
        ``[num_rows, out_features]``, dtype of ``x``, one rounding from fp32. A weight is its value
        of ``CODE``, rounded to the dtype of ``x``, times its block's maximum, not rounded.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract, or there are more than 64 rows
            (dequantise once and use a library product).
    """
    num_rows, in_features = x.shape
    check_float("x", x)
    check_rows("x", x)
    check_shape("x", x, -1, weight.in_features)
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"{num_rows} rows; 1 to {MAX_ROWS} are supported")
    if in_features % BLOCK:
        raise ValueError(f"in_features is {in_features}; a multiple of {BLOCK} is needed")
    nested = None if isinstance(weight.absmax, torch.Tensor) else weight.absmax
    absmax = weight.absmax if nested is None else nested.codes
    _check_weight(weight, absmax)
    tuned = tuning(x.device)
    out_features = weight.out_features
    tiles = triton.cdiv(num_rows, 16)
    parts, part_blocks = _parts(out_features, in_features // BLOCK, tuned)
    y = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    result = y
    if parts > 1:
        shape = (parts, num_rows, out_features)
        result = torch.empty(shape, dtype=torch.float32, device=x.device)
    nf4_matmul_kernel[(triton.cdiv(out_features, tuned.nf4_block_n), parts)](
        x,
        weight.packed,
        code_on(x.device),
        absmax,
        None if nested is None else nested.code2,
        None if nested is None else nested.absmax2,
        None if nested is None else nested.offset,
        result,
        num_rows,
        x.stride(0),
        in_features,
        out_features,
        part_blocks,
        TILES=4 if tiles > 2 else tiles,
        BLOCK_N=tuned.nf4_block_n,
        PTX=tuned.inline_ptx,
        num_warps=4,
        num_stages=tuned.nf4_stages,
        enable_fp_fusion=True,
    )
    if parts > 1:
        nf4_sum_kernel[(triton.cdiv(y.numel(), _SUM_BLOCK),)](
            result, y, y.numel(), PARTS=parts, BLOCK=_SUM_BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return y


def _parts(out_features: int, blocks: int, tuned: Tuning) -> tuple[int, int]:
    """How many parts the input features are cut into, and quantisation blocks of a part.

    Of the weight's shape alone: the order of a row's sum may not depend on the other rows.
    """
    columns = triton.cdiv(out_features, tuned.nf4_block_n)
    parts = 1
    while 2 * parts * columns <= tuned.nf4_programs and blocks >= 2 * parts * tuned.nf4_part_blocks:
        parts *= 2
    return parts, triton.cdiv(blocks, parts)


def _check_weight(weight: Nf4Matrix, absmax: torch.Tensor) -> None:
    size = weight.out_features * weight.in_features
    check_contiguous("packed", weight.packed)
    check_length("packed", weight.packed, size // 2)
    # The kernel indexes it with 32 bits: 64 cost registers.
    if size // 2 >= 1 << 31:
        raise ValueError(f"packed has {size // 2} bytes; 2³¹ are too many")
    check_contiguous("absmax", absmax)
    check_length("absmax", absmax, size // BLOCK)
