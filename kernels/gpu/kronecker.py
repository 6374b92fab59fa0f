"""Triton form of ``kronecker``: ``y += w · vec(w1 · X · w2ᵀ)`` per row, in place.

A program takes one row and a tile of ``out_k``: it makes ``T = X · w2ᵀ`` for the tile, which stays
on chip, and multiplies all of ``w1`` by it. ``w1`` is the small factor (LoKr splits off the smaller
one), so it comes from cache.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.common import (
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
    dot,
    dot_split,
    split_dot,
    tuning,
    wgmma_stages,
)
from turret.kernels.gpu.tables import ROW_HEADER, RowTable

MAX_IN_M = 128
MAX_RANK = 128
_HEADER = tl.constexpr(ROW_HEADER)

# A dense second factor [num_slots, out_k, in_n], or its two factors [num_slots, out_k, r] and
# [num_slots, r, in_n].
SecondFactor = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


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
    w1_ptr,  # [num_slots, out_l, in_m]
    w2_ptr,  # [num_slots, out_k, in_n], or w2b [num_slots, rank, in_n]
    w2a_ptr,  # [num_slots, out_k, rank] or None
    table_ptr,
    x_stride,
    y_stride,
    in_m,
    in_n,
    out_l,
    out_k,
    rank,
    capacity,
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
        slot = tl.load(at + capacity).to(tl.int64)
        weight = tl.load(at + 2 * capacity).to(tl.float32, bitcast=True)
        start = (work % tiles) * BLOCK_N
        n = start + tl.arange(0, BLOCK_N)
        x_row = x_ptr + row * x_stride
        if w2a_ptr is None:
            w2_at = w2_ptr + slot * out_k * in_n
            inner = _inner(
                x_row, w2_at, in_n, 1, out_k, start, in_m, in_n, BLOCK_J, BLOCK_N, BLOCK_L
            )
        else:
            w2_at = w2_ptr + slot * rank * in_n
            low = _inner(x_row, w2_at, in_n, 1, rank, 0, in_m, in_n, BLOCK_J, BLOCK_R, BLOCK_L)
            r = tl.arange(0, BLOCK_R)
            w2a = tl.load(
                w2a_ptr + slot * out_k * rank + n[None, :] * rank + r[:, None],
                mask=(n < out_k)[None, :] & (r < rank)[:, None],
                other=0.0,
            )
            inner = split_dot(low, w2a, tl.zeros((BLOCK_J, BLOCK_N), dtype=tl.float32))
        for i0 in range(0, out_l, BLOCK_I):
            i = i0 + tl.arange(0, BLOCK_I)
            w1 = tl.load(
                w1_ptr + (slot * out_l + i)[:, None] * in_m + j[None, :],
                mask=(i < out_l)[:, None] & (j < in_m)[None, :],
                other=0.0,
            )
            delta = dot_split(w1, inner, tl.zeros((BLOCK_I, BLOCK_N), dtype=tl.float32))
            y_at = y_ptr + row * y_stride + i[:, None] * out_k + n[None, :]
            keep = (i < out_l)[:, None] & (n < out_k)[None, :]
            base = tl.load(y_at, mask=keep, other=0.0).to(tl.float32)
            tl.store(y_at, (base + weight * delta).to(y_ptr.dtype.element_ty), mask=keep)


def kronecker(
    x: torch.Tensor, y: torch.Tensor, w1: torch.Tensor, w2: SecondFactor, table: RowTable
) -> None:
    """Add the updates of the table's rows in place, one rounding to the dtype of ``y``.

    Args:
        x: Activations of the whole step, ``[num_rows, in_m · in_n]``, fp16, bf16 or fp32; rows may
            be strided.
        y: Base results of one slice, ``[num_rows, out_l · out_k]``, dtype of ``x``; rows may be
            strided.
        w1: ``[num_slots, out_l, in_m]``, dtype of ``x``, contiguous, in_m ≤ 128.
        w2: ``[num_slots, out_k, in_n]``, or ``(w2a, w2b)``: ``[num_slots, out_k, r]`` and
            ``[num_slots, r, in_n]``, r ≤ 128; dtype of ``x``, contiguous.
        table: Which rows, with which slots and weights.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    w2a, dense = (None, w2) if isinstance(w2, torch.Tensor) else w2
    out_l, in_m = w1.shape[1:]
    in_n = dense.shape[2]
    rank = 0 if w2a is None else dense.shape[1]
    out_k = dense.shape[1] if w2a is None else w2a.shape[1]
    _check(x, y, w1, dense, w2a)
    tuned = tuning(x.device)
    kronecker_kernel[(tuned.programs,)](
        x,
        y,
        w1,
        dense,
        w2a,
        table.buffer,
        x.stride(0),
        y.stride(0),
        in_m,
        in_n,
        out_l,
        out_k,
        rank,
        table.capacity,
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


def _check(
    x: torch.Tensor,
    y: torch.Tensor,
    w1: torch.Tensor,
    dense: torch.Tensor,
    w2a: torch.Tensor | None,
) -> None:
    check_float("x", x)
    check_float("y", y, x.dtype)
    check_rows("x", x)
    check_rows("y", y)
    slots, out_l, in_m = w1.shape
    if w2a is not None:
        check_shape("w2a", w2a, slots, -1, dense.shape[1])
        if dense.shape[1] > MAX_RANK:
            raise ValueError(f"rank {dense.shape[1]} is over {MAX_RANK}")
    if in_m > MAX_IN_M:
        raise ValueError(f"in_m is {in_m}; at most {MAX_IN_M} is supported")
    check_shape("w2", dense, slots, -1, -1)
    check_shape("x", x, -1, in_m * dense.shape[2])
    check_shape("y", y, x.shape[0], out_l * (dense if w2a is None else w2a).shape[1])
    for name, factor in (("w1", w1), ("w2", dense), ("w2a", w2a)):
        if factor is not None:
            check_float(name, factor, x.dtype)
            check_contiguous(name, factor)
