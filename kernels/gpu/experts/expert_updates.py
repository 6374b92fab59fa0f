"""Low-rank updates of experts: ``y_p += w · B_e (A_e x_p)`` for pairs of a row and an expert.

Two launches, shrink and expand, a program per pair and tile: the factors of a pair are those of its
row's adapter and its own expert, so that pairs seldom share any. A pair's sums run in an order of
its own. Factors are found by their addresses: an adapter takes its own bytes and no more.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.expert_routing import Routing
from turret.kernels.gpu.shared.addresses import pointer_to
from turret.kernels.gpu.shared.contract import (
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
)
from turret.kernels.gpu.tables.row_table import HEADER, RowTable

_HEADER = tl.constexpr(HEADER)
_BLOCK_R, _BLOCK_K, _BLOCK_N = 16, 128, 128


@triton.jit
def _address_of(factors_ptr, WHICH: tl.constexpr, table_ptr, row, capacity):
    """The address of A (0) or B (1) of a row's adapter; 0 if there is none."""
    is_in = row < tl.load(table_ptr)
    slot = tl.load(table_ptr + _HEADER + capacity + row, mask=is_in, other=-1).to(tl.int64)
    return tl.load(factors_ptr + 2 * slot + WHICH, mask=slot >= 0, other=0)


@triton.jit
def expert_shrink_kernel(
    x_ptr,  # [num_rows, in_features]
    reads_ptr,  # [num_pairs] int64: the row of x that each pair reads; None: its own
    rows_ptr,  # [num_pairs] int64: the row whose adapter it has
    experts_ptr,  # [num_pairs] int64
    factors_ptr,  # [num_slots, 2] int64: where A, [num_experts, rank, in_features], and B lie
    v_ptr,  # [num_pairs, rank] fp32
    table_ptr,
    x_stride,
    in_features,
    rank,
    capacity,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    address = _address_of(factors_ptr, 0, table_ptr, tl.load(rows_ptr + pair), capacity)
    if address != 0:
        a_ptr = pointer_to(address, x_ptr)
        read = pair
        if reads_ptr is not None:
            read = tl.load(reads_ptr + pair)
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        k = tl.arange(0, BLOCK_K)
        factor = tl.load(experts_ptr + pair) * rank
        a_at = a_ptr + (factor + r)[:, None] * in_features + k[None, :]
        x_at = x_ptr + read * x_stride + k
        acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
        for start in range(0, in_features, BLOCK_K):
            keep = start + k < in_features
            x = tl.load(x_at + start, mask=keep, other=0.0).to(tl.float32)
            a = tl.load(a_at + start, mask=(r < rank)[:, None] & keep[None, :], other=0.0)
            acc += a.to(tl.float32) * x[None, :]
        tl.store(v_ptr + pair * rank + r, tl.sum(acc, axis=1), mask=r < rank)


@triton.jit
def expert_expand_kernel(
    v_ptr,  # [num_pairs, rank] fp32
    rows_ptr,  # [num_pairs] int64
    experts_ptr,  # [num_pairs] int64
    factors_ptr,  # [num_slots, 2] int64: where A and B, [num_experts, rank, out_features], lie
    y_ptr,  # [num_pairs, out_features]
    table_ptr,
    y_stride,
    out_features,
    rank,
    capacity,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + pair)
    address = _address_of(factors_ptr, 1, table_ptr, row, capacity)
    if address != 0:
        b_ptr = pointer_to(address, y_ptr)
        weight = tl.load(table_ptr + _HEADER + 2 * capacity + row).to(tl.float32, bitcast=True)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < out_features
        factor = tl.load(experts_ptr + pair) * rank
        delta = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            v = tl.load(v_ptr + pair * rank + r, mask=r < rank, other=0.0)
            b_at = b_ptr + (factor + r)[:, None] * out_features + n[None, :]
            b = tl.load(b_at, mask=(r < rank)[:, None] & inside[None, :], other=0.0)
            delta += tl.sum(v[:, None] * b.to(tl.float32), axis=0)
        y_at = y_ptr + pair * y_stride + n
        y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_at, (y + weight * delta).to(y_ptr.dtype.element_ty), mask=inside)


def add_expert_updates(
    x: torch.Tensor,
    y: torch.Tensor,
    factors: torch.Tensor,
    rank: int,
    table: RowTable,
    routing: Routing,
    rows: torch.Tensor | None,
) -> None:
    """Add the updates in place, one rounding to the dtype of ``y``.

    Args:
        x: ``[num_rows, in_features]`` or ``[num_pairs, in_features]``, fp16, bf16 or fp32; rows may
            be strided.
        y: ``[num_pairs, out_features]``, dtype of ``x``; rows may be strided.
        factors: Addresses by slot, ``[num_slots, 2]`` int64, contiguous: of A, ``[num_experts,
            rank, in_features]``, and of B, ``[num_experts, rank, out_features]``. Both have the
            dtype of ``x``, are contiguous, and begin at multiples of 16 bytes. 0 for a slot
            without an update.
        rank: Of all of them.
        table: The slot and weight of every row from the first on, slot -1 for rows without an
            update; rows behind its last have none.
        routing: The pairs.
        rows: The row of ``x`` that each pair reads, ``[num_pairs]`` int64; None for its own.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract. What lies at the addresses is not
            checked: that would synchronise.
    """
    num_pairs, in_features, out_features = routing.rows.shape[0], x.shape[1], y.shape[1]
    _check(x, y, factors, num_pairs, gathers=rows is not None)
    v = torch.empty(num_pairs, rank, dtype=torch.float32, device=x.device)
    expert_shrink_kernel[(num_pairs, triton.cdiv(rank, _BLOCK_R))](
        x,
        rows,
        routing.rows,
        routing.experts,
        factors,
        v,
        table.buffer,
        x.stride(0),
        in_features,
        rank,
        table.capacity,
        BLOCK_R=_BLOCK_R,
        BLOCK_K=_BLOCK_K,
        num_warps=4,
        enable_fp_fusion=True,
    )
    expert_expand_kernel[(num_pairs, triton.cdiv(out_features, _BLOCK_N))](
        v,
        routing.rows,
        routing.experts,
        factors,
        y,
        table.buffer,
        y.stride(0),
        out_features,
        rank,
        table.capacity,
        BLOCK_R=_BLOCK_R,
        BLOCK_N=_BLOCK_N,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _check(
    x: torch.Tensor, y: torch.Tensor, factors: torch.Tensor, num_pairs: int, *, gathers: bool
) -> None:
    for name, tensor in (("x", x), ("y", y)):
        check_float(name, tensor, x.dtype)
        check_rows(name, tensor)
    check_shape("y", y, num_pairs, -1)
    check_shape("x", x, -1 if gathers else num_pairs, -1)
    check_shape("factors", factors, -1, 2)
    if factors.dtype != torch.int64:
        raise ValueError(f"factors is {factors.dtype}; torch.int64 is needed")
    check_contiguous("factors", factors)
