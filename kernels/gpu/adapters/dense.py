"""Triton form of ``dense``: ``y += w · D x`` per row, in place, ``D`` as large as the weight.

A program takes 64 rows of the table and a tile of outputs, and multiplies the rows of one adapter
after another: rows of one mix lie side by side, so that a prompt's are one product, and a tile of
many adapters reads each of their matrices once. A row's sum is that of its own row of the tile,
whatever is in the others. Matrices are found by their addresses: an adapter takes its own bytes.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.shared.addresses import pointer_to
from turret.kernels.gpu.shared.contract import (
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
)
from turret.kernels.gpu.shared.dots import dot
from turret.kernels.gpu.shared.tuning import tuning, wgmma_stages
from turret.kernels.gpu.tables.row_table import HEADER, RowTable

_HEADER = tl.constexpr(HEADER)
_NONE = tl.constexpr(2**31 - 1)
# Of the widest instruction there is: the order of a row's sum may not depend on how many there are.
_BLOCK_M, _BLOCK_N, _BLOCK_K = 64, 32, 64


@triton.jit
def dense_kernel(
    x_ptr,  # [num_rows, in_features]
    y_ptr,  # [num_rows, out_features]
    weights_ptr,  # [num_slots] int64: where D, [out_features, in_features], lies
    table_ptr,
    x_stride,
    y_stride,
    in_features,
    out_features,
    capacity,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    count = tl.load(table_ptr)
    blocks = tl.cdiv(out_features, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    num_work = tl.cdiv(count, BLOCK_M) * blocks
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        first = (work // blocks) * BLOCK_M
        n = (work % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_row = first + m < count
        entries = table_ptr + _HEADER + first + m
        rows = tl.load(entries, mask=is_row, other=0).to(tl.int64)
        slots = tl.load(entries + capacity, mask=is_row, other=_NONE)
        weights = tl.load(entries + 2 * capacity, mask=is_row, other=0)
        slot = tl.min(slots, axis=0)
        while slot < _NONE:
            address = tl.load(weights_ptr + slot)
            # An adapter may leave a layer's module as it is.
            if address != 0:
                d_ptr = pointer_to(address, x_ptr)
                mine = slots == slot
                x_at = x_ptr + rows[:, None] * x_stride
                d_at = d_ptr + n.to(tl.int64)[:, None] * in_features
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                for start in range(0, in_features, BLOCK_K):
                    keep = start + k < in_features
                    x = tl.load(
                        x_at + (start + k)[None, :], mask=mine[:, None] & keep[None, :], other=0.0
                    )
                    d = tl.load(
                        d_at + (start + k)[None, :],
                        mask=(n < out_features)[:, None] & keep[None, :],
                        other=0.0,
                    )
                    acc = dot(x, tl.trans(d), acc)
                inside = mine[:, None] & (n < out_features)[None, :]
                y_at = y_ptr + rows[:, None] * y_stride + n[None, :]
                y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
                y += weights.to(tl.float32, bitcast=True)[:, None] * acc
                tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)
            slot = tl.min(tl.where(slots > slot, slots, _NONE), axis=0)


def dense(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, table: RowTable) -> None:
    """Add the updates of the table's rows in place, one rounding to the dtype of ``y``.

    Args:
        x: ``[num_rows, in]``, fp16, bf16 or fp32; rows may be strided.
        y: Base results of one slice, ``[num_rows, out]``, dtype of ``x``; rows may be strided.
        weights: Addresses by slot, ``[num_slots]`` int64, contiguous: of ``D``, ``[out, in]``,
            dtype of ``x``, contiguous, beginning at a multiple of 16 bytes. 0 for a slot without
            an update.
        table: Which rows, with which slots and weights.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract. What lies at the addresses is not
            checked: that would synchronise.
    """
    check_float("x", x)
    check_float("y", y, x.dtype)
    check_rows("x", x)
    check_rows("y", y)
    check_shape("y", y, x.shape[0], -1)
    check_shape("weights", weights, -1)
    if weights.dtype != torch.int64:
        raise ValueError(f"weights is {weights.dtype}; torch.int64 is needed")
    check_contiguous("weights", weights)
    dense_kernel[(tuning(x.device).programs,)](
        x,
        y,
        weights,
        table.buffer,
        x.stride(0),
        y.stride(0),
        x.shape[1],
        y.shape[1],
        table.capacity,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        num_warps=4,
        num_stages=wgmma_stages(4),
        enable_fp_fusion=True,
    )
