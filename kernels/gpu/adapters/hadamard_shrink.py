"""Triton form of ``hadamard_shrink``: ``U = w1b · diag(x) · w2bᵀ`` per row.

A program takes one row, one slice and one part of the input features. The parts are added up by
expand, in their order.
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
from turret.kernels.gpu.shared.dots import split_dot
from turret.kernels.gpu.shared.tuning import tuning, wgmma_stages
from turret.kernels.gpu.tables.row_table import HEADER, RowTable

MAX_RANK = 64
_HEADER = tl.constexpr(HEADER)


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
