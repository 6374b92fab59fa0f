"""Hadamard updates: ``U = w1b · diag(x) · w2bᵀ``, then ``y[o] += w · w1a[o] U w2a[o]ᵀ``.

In the first step (shrink), a program computes ``U`` of one row over a part of the input features.
The second step (expand) adds these parts in order.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.common import (
    check_addresses,
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
    dot_split,
    pointer_to,
    split_dot,
    tuning,
    wgmma_stages,
)
from turret.kernels.gpu.tables import ROW_HEADER, RowTable

MAX_RANK = 64
_HEADER = tl.constexpr(ROW_HEADER)


@triton.jit
def hadamard_shrink_kernel(
    x_ptr,  # [num_rows, in_features]
    factors_ptr,  # [num_slots, 4] int64: addresses of w1a, w1b [rank, in_features], w2a, w2b
    u_ptr,  # [SPLITS, capacity, rank, rank] fp32
    table_ptr,
    x_stride,
    in_features,
    rank,
    capacity,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_work = tl.load(table_ptr) * SPLITS
    split_width = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLITS) * BLOCK_K
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    factor_rows = r[:, None] * in_features
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        split = work % SPLITS
        i = work // SPLITS
        row = tl.load(table_ptr + _HEADER + i).to(tl.int64)
        factors = factors_ptr + tl.load(table_ptr + _HEADER + capacity + i).to(tl.int64) * 4
        address = tl.load(factors + 1)
        if address != 0:
            w1b_ptr = pointer_to(address, x_ptr)
            w2b_ptr = pointer_to(tl.load(factors + 3), x_ptr)
            start = split * split_width
            acc = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)
            for k0 in range(start, tl.minimum(start + split_width, in_features), BLOCK_K):
                cols = k0 + k
                inside = cols < in_features
                keep = (r < rank)[:, None] & inside[None, :]
                x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0)
                left = tl.load(w1b_ptr + factor_rows + cols[None, :], mask=keep, other=0.0)
                right = tl.load(w2b_ptr + factor_rows + cols[None, :], mask=keep, other=0.0)
                scaled = left.to(tl.float32) * x.to(tl.float32)[None, :]
                acc = split_dot(scaled, tl.trans(right), acc)
            at = (split * capacity + i).to(tl.int64) * rank * rank
            offsets = r[:, None] * rank + r[None, :]
            tl.store(u_ptr + at + offsets, acc, mask=(r < rank)[:, None] & (r < rank)[None, :])


def hadamard_shrink(
    x: torch.Tensor, factors: torch.Tensor, rank: int, table: RowTable
) -> torch.Tensor:
    """Shrink the rows of a table.

    Args:
        x: Activations of the whole step, ``[num_rows, in_features]``, fp16, bf16 or fp32; rows may
            be strided.
        factors: Addresses by slot, ``[num_slots, 4]`` int64, contiguous: of w1a ``[out, r]``, w1b
            ``[r, in_features]``, w2a and w2b. All have the dtype of ``x``, are contiguous, and
            begin at multiples of 16 bytes. The addresses of a slot without an update are 0.
        rank: The rank of all factors, at most 64.
        table: The rows and their slots.

    Returns:
        ``[splits, capacity, r, r]``, fp32, by position in the table. The sum over the first axis is
        ``U``. Positions without an update, or beyond the table's count, are undefined.

    Raises:
        ValueError: A shape, dtype or stride is invalid, or r is above 64. The memory at the
            addresses is not checked, because the host would have to wait for the device.
    """
    check_float("x", x)
    check_rows("x", x)
    check_addresses("factors", factors, 4)
    if rank > MAX_RANK:
        raise ValueError(f"rank {rank} is over {MAX_RANK}")
    tuned = tuning(x.device)
    block_r = max(16, triton.next_power_of_2(rank))
    shape = (tuned.hadamard_splits, table.capacity, rank, rank)
    u = torch.empty(shape, dtype=torch.float32, device=x.device)
    hadamard_shrink_kernel[(tuned.programs,)](
        x,
        factors,
        u,
        table.buffer,
        x.stride(0),
        x.shape[1],
        rank,
        table.capacity,
        SPLITS=tuned.hadamard_splits,
        BLOCK_R=block_r,
        BLOCK_K=max(16, tuned.hadamard_block_k * 32 // max(block_r, 32)),
        num_warps=4,
        num_stages=wgmma_stages(2) if block_r == 64 else 2,
        enable_fp_fusion=True,
    )
    return u


@triton.jit
def hadamard_expand_kernel(
    y_ptr,  # [num_rows, out] of one slice
    u_ptr,  # [SPLITS, capacity, rank, rank] fp32
    factors_ptr,  # [num_slots, 4] int64: addresses of w1a [out, rank], w1b, w2a [out, rank], w2b
    table_ptr,
    y_stride,
    out,
    rank,
    capacity,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(out, BLOCK_N)
    num_work = tl.load(table_ptr) * tiles
    r = tl.arange(0, BLOCK_R)
    square = r[:, None] * rank + r[None, :]
    keep_u = (r < rank)[:, None] & (r < rank)[None, :]
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        i = work // tiles
        cols = (work % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = cols < out
        row = tl.load(table_ptr + _HEADER + i).to(tl.int64)
        factors_at = factors_ptr + tl.load(table_ptr + _HEADER + capacity + i).to(tl.int64) * 4
        bits = tl.load(table_ptr + _HEADER + 2 * capacity + i)
        weight = bits.to(tl.float32, bitcast=True)
        address = tl.load(factors_at)
        if address != 0:
            w1a_ptr = pointer_to(address, y_ptr)
            w2a_ptr = pointer_to(tl.load(factors_at + 2), y_ptr)
            u = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)
            for split in tl.static_range(SPLITS):
                at = (split * capacity + i).to(tl.int64) * rank * rank
                u += tl.load(u_ptr + at + square, mask=keep_u, other=0.0)
            # [BLOCK_N, BLOCK_R]
            factors = cols[:, None].to(tl.int64) * rank + r[None, :]
            keep = inside[:, None] & (r < rank)[None, :]
            left = tl.load(w1a_ptr + factors, mask=keep, other=0.0)
            right = tl.load(w2a_ptr + factors, mask=keep, other=0.0)
            product = dot_split(left, u, tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32))
            delta = tl.sum(product * right.to(tl.float32), axis=1)
            y_at = y_ptr + row * y_stride + cols
            base = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
            tl.store(y_at, (base + weight * delta).to(y_ptr.dtype.element_ty), mask=inside)


def hadamard_expand(
    y: torch.Tensor, u: torch.Tensor, factors: torch.Tensor, table: RowTable
) -> None:
    """Add the updates of the table's rows to ``y`` in place, rounded once to its dtype.

    Args:
        y: Base results of one slice for the whole step, ``[num_rows, out]``; rows may be strided.
        u: Result of ``hadamard_shrink`` for the same table and factors.
        factors: See ``hadamard_shrink``.
        table: The rows, their slots and their weights.

    Raises:
        ValueError: A shape, dtype or stride is invalid.
    """
    check_float("y", y)
    check_rows("y", y)
    check_addresses("factors", factors, 4)
    rank = u.shape[-1]
    check_shape("u", u, -1, table.capacity, rank, rank)
    check_contiguous("u", u)
    check_float("u", u, torch.float32)
    tuned = tuning(y.device)
    block_r = max(16, triton.next_power_of_2(rank))
    hadamard_expand_kernel[(tuned.programs,)](
        y,
        u,
        factors,
        table.buffer,
        y.stride(0),
        y.shape[1],
        rank,
        table.capacity,
        SPLITS=u.shape[0],
        BLOCK_R=block_r,
        BLOCK_N=max(16, tuned.hadamard_block_n * 32 // max(32, block_r)),
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )
