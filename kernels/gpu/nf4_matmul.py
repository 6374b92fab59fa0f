"""Triton form of ``nf4_matmul``: dequantise in registers and multiply, for 1 to 64 rows.

Bound by the half byte per weight. A program takes a tile of output columns and walks the input
features; every row goes through the same tensor-core instruction (16 rows a tile), so a row's bits
do not depend on how many there are. The two nibbles of a byte are even and odd columns: two
products with the even and the odd columns of ``x`` spare interleaving them.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import functools

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
from turret.kernels.gpu.tuning import tuning
from turret.kernels.nf4_matmul import BLOCK, CODE, GROUP, Nf4Matrix

MAX_ROWS = 64
_BLOCK = tl.constexpr(BLOCK)
_HALF = tl.constexpr(BLOCK // 2)
_GROUP = tl.constexpr(GROUP)


# One compiled form for every number of rows.
@triton.jit(do_not_specialize=["num_rows"])
def nf4_matmul_kernel(
    x_ptr,  # [num_rows, in_features]
    packed_ptr,  # [out_features, in_features / 2] uint8
    code_ptr,  # [16] fp32
    absmax_ptr,  # [out_features, in_features / 64] fp32, or uint8 if nested
    code2_ptr,  # [256] fp32, or None
    absmax2_ptr,  # fp32, or None
    offset_ptr,  # fp32, or None
    y_ptr,  # [num_rows, out_features]
    num_rows,
    x_stride,
    in_features,
    out_features,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
):
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = m < num_rows
    inside_n = n < out_features
    blocks = in_features // _BLOCK
    first_block = n.to(tl.int64) * blocks
    pair = tl.arange(0, GROUPS * _HALF)
    # Column of the even nibble of each byte, within the step.
    even = (pair // _HALF) * _BLOCK + (pair % _HALF) * 2
    half = tl.arange(0, _HALF)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for g0 in range(0, blocks, GROUPS):
        g = g0 + tl.arange(0, GROUPS)
        keep = inside_n[:, None] & (g < blocks)[None, :]
        block = first_block[:, None] + g[None, :]
        absmax = tl.load(absmax_ptr + block, mask=keep, other=0)
        if code2_ptr is not None:
            scale2 = tl.load(absmax2_ptr + block // _GROUP, mask=keep, other=0.0)
            offset = tl.load(offset_ptr + block // _GROUP, mask=keep, other=0.0)
            absmax = tl.load(code2_ptr + absmax.to(tl.int32)) * scale2 + offset
        byte_at = packed_ptr + block[:, :, None] * _HALF + half[None, None, :]
        byte = tl.load(byte_at, mask=keep[:, :, None], other=0).to(tl.int32)
        high = tl.load(code_ptr + (byte >> 4)) * absmax[:, :, None]
        low = tl.load(code_ptr + (byte & 15)) * absmax[:, :, None]
        high = tl.reshape(high, (BLOCK_N, GROUPS * _HALF)).to(x_ptr.dtype.element_ty)
        low = tl.reshape(low, (BLOCK_N, GROUPS * _HALF)).to(x_ptr.dtype.element_ty)
        cols = g0 * _BLOCK + even
        x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride + cols[None, :]
        keep_x = live[:, None] & (cols < in_features)[None, :]
        acc = dot(tl.load(x_at, mask=keep_x, other=0.0), tl.trans(high), acc)
        acc = dot(tl.load(x_at + 1, mask=keep_x, other=0.0), tl.trans(low), acc)
    y_at = y_ptr + m.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=live[:, None] & inside_n[None, :])


@functools.cache
def code_on(device: torch.device) -> torch.Tensor:
    """The sixteen values, ``[16]`` fp32, copied to the device once."""
    return torch.tensor(CODE, device=device)


def nf4_matmul(x: torch.Tensor, weight: Nf4Matrix) -> torch.Tensor:
    """Multiply by a quantised weight without writing it out.

    Args:
        x: ``[num_rows, in_features]``, 1 to 64 rows, fp16, bf16 or fp32; rows may be strided.
        weight: The weight; its tensors contiguous, on the device of ``x``.

    Returns:
        ``[num_rows, out_features]``, dtype of ``x``, one rounding from fp32.

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
    size = weight.out_features * in_features
    for name, values, count in (
        ("packed", weight.packed, size // 2),
        ("absmax", absmax, size // BLOCK),
    ):
        check_contiguous(name, values)
        check_length(name, values, count)
    tuned = tuning(x.device)
    y = torch.empty(num_rows, weight.out_features, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(weight.out_features, tuned.nf4_block_n), triton.cdiv(num_rows, 16))
    nf4_matmul_kernel[grid](
        x,
        weight.packed,
        code_on(x.device),
        absmax,
        None if nested is None else nested.code2,
        None if nested is None else nested.absmax2,
        None if nested is None else nested.offset,
        y,
        num_rows,
        x.stride(0),
        in_features,
        weight.out_features,
        BLOCK_M=16,
        BLOCK_N=tuned.nf4_block_n,
        GROUPS=tuned.nf4_groups,
        num_warps=4,
        num_stages=4,
        enable_fp_fusion=True,
    )
    return y
