"""Hadamard updates: ``U = w1b · diag(x) · w2bᵀ``, then ``y[o] += w · w1a[o] U w2a[o]ᵀ``.

A program of the first step takes one row, one slice and one part of the input features. The second
adds the parts up, in their order.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.common import (
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
    dot_split,
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
    w1b_ptr,  # [num_slots, num_slices, rank, in_features]
    w2b_ptr,
    u_ptr,  # [SPLITS, capacity, num_slices, rank, rank] fp32
    table_ptr,
    x_stride,
    in_features,
    num_slices,
    rank,
    capacity,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_work = tl.load(table_ptr) * num_slices * SPLITS
    split_width = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLITS) * BLOCK_K
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        split = work % SPLITS
        s = (work // SPLITS) % num_slices
        i = work // (SPLITS * num_slices)
        row = tl.load(table_ptr + _HEADER + i).to(tl.int64)
        slot = tl.load(table_ptr + _HEADER + capacity + i).to(tl.int64)
        # [BLOCK_R, 1]
        factor_rows = ((slot * num_slices + s) * rank + r)[:, None] * in_features
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
        at = ((split * capacity + i).to(tl.int64) * num_slices + s) * rank * rank
        offsets = r[:, None] * rank + r[None, :]
        tl.store(u_ptr + at + offsets, acc, mask=(r < rank)[:, None] & (r < rank)[None, :])


def hadamard_shrink(
    x: torch.Tensor, w1b: torch.Tensor, w2b: torch.Tensor, table: RowTable
) -> torch.Tensor:
    """Shrink the rows of a table.

    Args:
        x: Activations of the whole step, ``[num_rows, in_features]``, fp16, bf16 or fp32; rows may
            be strided.
        w1b: ``[num_slots, num_slices, r, in_features]``, dtype of ``x``, contiguous, r ≤ 64.
        w2b: Same shape.
        table: Which rows, with which slots.

    Returns:
        ``[splits, capacity, num_slices, r, r]``, fp32, by position in the table; the sum over the
        first axis is ``u``. Positions past the table's count are undefined.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract, or r is over 64 (build the update
            tile by tile, or refuse the adapter).
    """
    check_float("x", x)
    check_shape("w1b", w1b, -1, -1, -1, x.shape[1])
    check_shape("w2b", w2b, *w1b.shape)
    check_rows("x", x)
    for name, factor in (("w1b", w1b), ("w2b", w2b)):
        check_float(name, factor, x.dtype)
        check_contiguous(name, factor)
    num_slices, rank, in_features = w1b.shape[1:]
    if rank > MAX_RANK:
        raise ValueError(f"rank {rank} is over {MAX_RANK}")
    tuned = tuning(x.device)
    block_r = max(16, triton.next_power_of_2(rank))
    shape = (tuned.hadamard_splits, table.capacity, num_slices, rank, rank)
    u = torch.empty(shape, dtype=torch.float32, device=x.device)
    hadamard_shrink_kernel[(tuned.programs,)](
        x,
        w1b,
        w2b,
        u,
        table.buffer,
        x.stride(0),
        in_features,
        num_slices,
        rank,
        table.capacity,
        SPLITS=tuned.hadamard_splits,
        BLOCK_R=block_r,
        BLOCK_K=max(16, tuned.hadamard_block_k * 16 // block_r),
        num_warps=4,
        num_stages=wgmma_stages(2) if block_r == 64 else 2,
        enable_fp_fusion=True,
    )
    return u


# Triton form of ``hadamard_expand``: ``y[o] += w · w1a[o] · U · w2a[o]ᵀ`` per row, in place.


@triton.jit
def hadamard_expand_kernel(
    y_ptr,  # [num_rows, out] of one slice
    u_ptr,  # [SPLITS, capacity, num_slices, rank, rank] fp32, at the slice
    w1a_ptr,  # [num_slots, out, rank]
    w2a_ptr,
    table_ptr,
    y_stride,
    out,
    rank,
    u_stride,  # of a table position
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
        slot = tl.load(table_ptr + _HEADER + capacity + i).to(tl.int64)
        bits = tl.load(table_ptr + _HEADER + 2 * capacity + i)
        weight = bits.to(tl.float32, bitcast=True)
        u = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            at = (split * capacity + i).to(tl.int64) * u_stride
            u += tl.load(u_ptr + at + square, mask=keep_u, other=0.0)
        # [BLOCK_N, BLOCK_R]
        factors = (slot * out + cols)[:, None] * rank + r[None, :]
        keep = inside[:, None] & (r < rank)[None, :]
        left = tl.load(w1a_ptr + factors, mask=keep, other=0.0)
        right = tl.load(w2a_ptr + factors, mask=keep, other=0.0)
        product = dot_split(left, u, tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32))
        delta = tl.sum(product * right.to(tl.float32), axis=1)
        y_at = y_ptr + row * y_stride + cols
        base = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_at, (base + weight * delta).to(y_ptr.dtype.element_ty), mask=inside)


def hadamard_expand(
    y: torch.Tensor,
    u: torch.Tensor,
    w1a: Sequence[torch.Tensor],
    w2a: Sequence[torch.Tensor],
    table: RowTable,
) -> None:
    """Add the updates of the table's rows in place, one rounding to the dtype of ``y``.

    Args:
        y: Base results of the whole step, ``[num_rows, sum(out_s)]``; rows may be strided.
        u: Result of ``hadamard_shrink`` for the same table.
        w1a: Per slice ``[num_slots, out_s, r]``, dtype of ``y``, contiguous.
        w2a: Same shapes.
        table: Which rows, with which slots and weights.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("y", y)
    check_rows("y", y)
    check_shape("y", y, -1, sum(factor.shape[1] for factor in w1a))
    rank = u.shape[-1]
    check_shape("u", u, -1, table.capacity, len(w1a), rank, rank)
    check_contiguous("u", u)
    check_float("u", u, torch.float32)
    tuned = tuning(y.device)
    block_r = max(16, triton.next_power_of_2(rank))
    start = 0
    for s, (left, right) in enumerate(zip(w1a, w2a, strict=True)):
        check_shape(f"w1a[{s}]", left, -1, -1, rank)
        check_shape(f"w2a[{s}]", right, *left.shape)
        for name, factor in ((f"w1a[{s}]", left), (f"w2a[{s}]", right)):
            check_float(name, factor, y.dtype)
            check_contiguous(name, factor)
        out = left.shape[1]
        hadamard_expand_kernel[(tuned.programs,)](
            y[:, start : start + out],
            u[:, :, s],
            left,
            right,
            table.buffer,
            y.stride(0),
            out,
            rank,
            u.stride(1),
            table.capacity,
            SPLITS=u.shape[0],
            BLOCK_R=block_r,
            BLOCK_N=max(16, tuned.hadamard_block_n * 32 // max(32, block_r)),
            num_warps=4,
            num_stages=1,
            enable_fp_fusion=True,
        )
        start += out
