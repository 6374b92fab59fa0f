"""Triton form of ``sparse``: ``y += w · S x`` per row, in place, ``S`` as compressed rows.

A program takes one row and a tile of outputs and reads the outputs' entries side by side, 64 of
each at a time; what they gather from ``x`` comes from cache.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.adapters.sparse import MAX_INPUTS
from turret.kernels.gpu.shared.contract import (
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
)
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.gpu.tables.row_table import HEADER, RowTable

_HEADER = tl.constexpr(HEADER)


@triton.jit
def sparse_kernel(
    x_ptr,  # [num_rows, in_features]
    y_ptr,  # [num_rows, out_features]
    values_ptr,  # [capacity of the entries]
    columns_ptr,  # likewise
    starts_ptr,  # [num_slots, out_features + 1], from the slot's first entry on
    firsts_ptr,  # [num_slots], the slot's first entry
    table_ptr,
    x_stride,
    y_stride,
    out_features,
    capacity,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(out_features, BLOCK_N)
    for work in range(tl.program_id(0), tl.load(table_ptr) * tiles, tl.num_programs(0)):
        at = table_ptr + _HEADER + work // tiles
        row = tl.load(at).to(tl.int64)
        slot = tl.load(at + capacity).to(tl.int64)
        weight = tl.load(at + 2 * capacity).to(tl.float32, bitcast=True)
        n = (work % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        keep = n < out_features
        starts_at = starts_ptr + slot * (out_features + 1) + n
        low = tl.load(starts_at, mask=keep, other=0)
        high = tl.load(starts_at + 1, mask=keep, other=0)
        first = tl.load(firsts_ptr + slot)
        longest = tl.max(high - low, axis=0)
        acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for k0 in range(0, longest, BLOCK_K):
            entry = low[:, None] + k0 + tl.arange(0, BLOCK_K)[None, :]
            there = entry < high[:, None]
            columns = tl.load(columns_ptr + first + entry, mask=there, other=0).to(tl.int32)
            values = tl.load(values_ptr + first + entry, mask=there, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + row * x_stride + columns, mask=there, other=0.0).to(tl.float32)
            acc += tl.sum(values * x, axis=1)
        y_at = y_ptr + row * y_stride + n
        base = tl.load(y_at, mask=keep, other=0.0).to(tl.float32)
        tl.store(y_at, (base + weight * acc).to(y_ptr.dtype.element_ty), mask=keep)


def sparse(
    x: torch.Tensor,
    y: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    row_starts: torch.Tensor,
    firsts: torch.Tensor,
    table: RowTable,
) -> None:
    """Add the updates of the table's rows in place, one rounding to the dtype of ``y``.

    Args:
        x: Activations of the whole step, ``[num_rows, in_features]``, fp16, bf16 or fp32; rows may
            be strided.
        y: Base results of one slice, ``[num_rows, out_features]``, dtype of ``x``; rows may be
            strided.
        values: Entries of all slots, ``[capacity]``, dtype of ``x``, contiguous.
        columns: Their inputs, ``[capacity]`` uint16, contiguous.
        row_starts: ``[num_slots, out_features + 1]`` int32, contiguous, counted from the slot's
            first entry on.
        firsts: Where each slot's entries begin, ``[num_slots]`` int64, contiguous.
        table: Which rows, with which slots and weights.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    _check(x, y, values, columns, row_starts, firsts)
    sparse_kernel[(tuning(x.device).programs,)](
        x,
        y,
        values,
        columns,
        row_starts,
        firsts,
        table.buffer,
        x.stride(0),
        y.stride(0),
        y.shape[1],
        table.capacity,
        BLOCK_N=16,
        BLOCK_K=64,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )


def _check(
    x: torch.Tensor,
    y: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    row_starts: torch.Tensor,
    firsts: torch.Tensor,
) -> None:
    check_float("x", x)
    check_float("y", y, x.dtype)
    check_float("values", values, x.dtype)
    check_rows("x", x)
    check_rows("y", y)
    check_shape("x", x, -1, -1)
    if x.shape[1] > MAX_INPUTS:
        raise ValueError(f"x has {x.shape[1]} columns; at most {MAX_INPUTS} are supported")
    check_shape("y", y, x.shape[0], -1)
    check_shape("values", values, -1)
    check_shape("columns", columns, len(values))
    check_shape("row_starts", row_starts, -1, y.shape[1] + 1)
    check_shape("firsts", firsts, len(row_starts))
    for name, tensor, dtype in (
        ("columns", columns, torch.uint16),
        ("row_starts", row_starts, torch.int32),
        ("firsts", firsts, torch.int64),
    ):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, not {dtype}")
    for name, tensor in (("values", values), ("columns", columns), ("row_starts", row_starts)):
        check_contiguous(name, tensor)
    check_contiguous("firsts", firsts)
