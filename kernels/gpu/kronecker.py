"""Kronecker updates: ``y += w · vec(w1 · X · w2ᵀ)`` per row, in place.

A program computes one row and a tile of the ``out_k`` axis: it computes ``T = X · w2ᵀ`` for the
tile, which stays on chip, and multiplies all of ``w1`` by ``T``. ``w1`` is usually the smaller
factor of LoKr, so most reads of it come from the cache.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.common import (
    check_addresses,
    check_float,
    check_rows,
    check_shape,
    dot,
    dot_split,
    pointer_to,
    split_dot,
    tuning,
    wgmma_stages,
)
from turret.kernels.gpu.tables import ROW_HEADER, RowTable

MAX_IN_M = 128
MAX_RANK = 128
_HEADER = tl.constexpr(ROW_HEADER)


@triton.jit
def _inner(
    x_ptr,  # one row of x, [in_m, in_n]
    w_ptr,  # [num, in_n], rows w_stride apart, columns w_step apart
    w_stride,
    w_step,
    num,
    start,
    in_m,
    in_n,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """``X wᵀ`` for rows ``start …`` of ``w``, ``[BLOCK_J, BLOCK_N]`` fp32."""
    j = tl.arange(0, BLOCK_J)
    n = start + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_J, BLOCK_N), dtype=tl.float32)
    for l0 in range(0, in_n, BLOCK_L):
        cols = l0 + tl.arange(0, BLOCK_L)
        inside = cols < in_n
        x = tl.load(
            x_ptr + j[:, None] * in_n + cols[None, :],
            mask=(j < in_m)[:, None] & inside[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + n[None, :] * w_stride + cols[:, None] * w_step,
            mask=(n < num)[None, :] & inside[:, None],
            other=0.0,
        )
        acc = dot(x, w, acc)
    return acc


@triton.jit
def kronecker_kernel(
    x_ptr,  # [num_rows, in_m * in_n]
    y_ptr,  # [num_rows, out_l * out_k]
    factors_ptr,  # [num_slots, COUNT] int64: addresses of w1 [out_l, in_m], and w2 [out_k, in_n] or
    # its factors w2a [out_k, rank] and w2b [rank, in_n]
    table_ptr,
    x_stride,
    y_stride,
    in_m,
    in_n,
    out_l,
    out_k,
    rank,
    capacity,
    COUNT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    tiles = tl.cdiv(out_k, BLOCK_N)
    j = tl.arange(0, BLOCK_J)
    for work in range(tl.program_id(0), tl.load(table_ptr) * tiles, tl.num_programs(0)):
        at = table_ptr + _HEADER + work // tiles
        row = tl.load(at).to(tl.int64)
        factors = factors_ptr + tl.load(at + capacity).to(tl.int64) * COUNT
        weight = tl.load(at + 2 * capacity).to(tl.float32, bitcast=True)
        address = tl.load(factors)
        if address != 0:
            w1_ptr = pointer_to(address, x_ptr)
            # The last factor, w2 or w2b, has ``in_n`` columns.
            wide_ptr = pointer_to(tl.load(factors + COUNT - 1), x_ptr)
            start = (work % tiles) * BLOCK_N
            n = start + tl.arange(0, BLOCK_N)
            x_row = x_ptr + row * x_stride
            if COUNT == 2:
                inner = _inner(
                    x_row, wide_ptr, in_n, 1, out_k, start, in_m, in_n, BLOCK_J, BLOCK_N, BLOCK_L
                )
            else:
                low = _inner(
                    x_row, wide_ptr, in_n, 1, rank, 0, in_m, in_n, BLOCK_J, BLOCK_R, BLOCK_L
                )
                r = tl.arange(0, BLOCK_R)
                w2a = tl.load(
                    pointer_to(tl.load(factors + 1), x_ptr) + n[None, :] * rank + r[:, None],
                    mask=(n < out_k)[None, :] & (r < rank)[:, None],
                    other=0.0,
                )
                inner = split_dot(low, w2a, tl.zeros((BLOCK_J, BLOCK_N), dtype=tl.float32))
            for i0 in range(0, out_l, BLOCK_I):
                i = i0 + tl.arange(0, BLOCK_I)
                w1 = tl.load(
                    w1_ptr + i[:, None] * in_m + j[None, :],
                    mask=(i < out_l)[:, None] & (j < in_m)[None, :],
                    other=0.0,
                )
                delta = dot_split(w1, inner, tl.zeros((BLOCK_I, BLOCK_N), dtype=tl.float32))
                y_at = y_ptr + row * y_stride + i[:, None] * out_k + n[None, :]
                keep = (i < out_l)[:, None] & (n < out_k)[None, :]
                base = tl.load(y_at, mask=keep, other=0.0).to(tl.float32)
                tl.store(y_at, (base + weight * delta).to(y_ptr.dtype.element_ty), mask=keep)


def kronecker(
    x: torch.Tensor,
    y: torch.Tensor,
    factors: torch.Tensor,
    shapes: Sequence[Sequence[int]],
    table: RowTable,
) -> None:
    """Add the updates of the table's rows in place, one rounding to the dtype of ``y``.

    Args:
        x: Activations of the whole step, ``[num_rows, in_m · in_n]``, fp16, bf16 or fp32; rows may
            be strided.
        y: Base results of one slice, ``[num_rows, out_l · out_k]``, dtype of ``x``; rows may be
            strided.
        factors: Addresses by slot, ``[num_slots, len(shapes)]`` int64, contiguous. The factors
            have the dtype of ``x``, are contiguous, and begin at multiples of 16 bytes. The
            addresses of a slot without an update are 0.
        shapes: The shapes of w1, ``[out_l, in_m]``, in_m ≤ 128, and w2, ``[out_k, in_n]``, or the
            factors of w2, ``[out_k, r]`` and ``[r, in_n]``, r ≤ 128.
        table: The rows, their slots and their weights.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract. The memory at the addresses is not
            checked, because that would synchronise.
    """
    (out_l, in_m), *_, (rank, in_n) = shapes
    out_k, rank = shapes[1][0], rank if len(shapes) == 3 else 0
    check_float("x", x)
    check_float("y", y, x.dtype)
    check_rows("x", x)
    check_rows("y", y)
    check_addresses("factors", factors, len(shapes))
    check_shape("x", x, -1, in_m * in_n)
    check_shape("y", y, x.shape[0], out_l * out_k)
    if rank > MAX_RANK:
        raise ValueError(f"rank {rank} is over {MAX_RANK}")
    if in_m > MAX_IN_M:
        raise ValueError(f"in_m is {in_m}; at most {MAX_IN_M} is supported")
    tuned = tuning(x.device)
    kronecker_kernel[(tuned.programs,)](
        x,
        y,
        factors,
        table.buffer,
        x.stride(0),
        y.stride(0),
        in_m,
        in_n,
        out_l,
        out_k,
        rank,
        table.capacity,
        COUNT=len(shapes),
        BLOCK_J=max(16, triton.next_power_of_2(in_m)),
        BLOCK_R=max(16, triton.next_power_of_2(rank)),
        BLOCK_I=16,
        BLOCK_N=32,
        BLOCK_L=tuned.kronecker_block_l,
        num_warps=4,
        num_stages=wgmma_stages(2) if in_m > 32 else 2,
        **(tuned.registers(255) if in_m <= 16 else {}),
        enable_fp_fusion=True,
    )
