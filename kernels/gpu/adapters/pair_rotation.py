"""Triton form of ``pair_rotation``: ``y += Σ_k w_k sine_k ⊙ before_p(o)`` per row, in place.

A program takes a tile of rows that share a mix and a tile of outputs. ``before`` is a copy of what
the base gave, since ``y`` has its gains by now.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.shared.contract import check_float, check_rows, check_shape
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.gpu.tables.segment_table import ONE_ROW, RECORD, TILE_ROWS, TILES, SegmentTable

_RECORD = tl.constexpr(RECORD)
_BLOCK = 128


@triton.jit
def pair_rotation_kernel(
    before_ptr,  # [num_rows, width]
    y_ptr,  # [num_rows, width]
    sine_ptr,  # [pack slots, width] fp32, rows sine_stride apart
    groups_ptr,  # [pack slots] int32, groups_stride apart; 0 where an adapter has no pairs
    table_ptr,
    before_stride,
    y_stride,
    sine_stride,
    groups_stride,
    width,
    LIST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(width, BLOCK)
    rows_ptr = table_ptr + tl.load(table_ptr + 1)
    components_ptr = table_ptr + tl.load(table_ptr + 2)
    chunks_ptr = table_ptr + tl.load(table_ptr + LIST + 1)
    num_work = tl.load(table_ptr + LIST) * tiles
    m = tl.arange(0, BLOCK_M)
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        chunk_ptr = chunks_ptr + (work // tiles) * _RECORD
        live = m < tl.load(chunk_ptr + 1)
        rows = tl.load(rows_ptr + tl.load(chunk_ptr) + m, mask=live, other=0).to(tl.int64)
        cols = (work % tiles) * BLOCK + tl.arange(0, BLOCK)
        inside = cols < width
        keep = live[:, None] & inside[None, :]
        total = tl.zeros((BLOCK_M, BLOCK), dtype=tl.float32)
        found = 0
        for c in range(tl.load(chunk_ptr + 2), tl.load(chunk_ptr + 3)):
            slot = tl.load(components_ptr + c * _RECORD + 2).to(tl.int64)
            weight = tl.load(components_ptr + c * _RECORD + 4).to(tl.float32, bitcast=True)
            half = tl.load(groups_ptr + slot * groups_stride) // 2
            if half > 0:
                other = tl.where(cols // half % 2 == 0, cols + half, cols - half)
                sine = tl.load(sine_ptr + slot * sine_stride + cols, mask=inside, other=0.0)
                value = tl.load(
                    before_ptr + rows[:, None] * before_stride + other[None, :],
                    mask=keep,
                    other=0.0,
                )
                total += (weight * sine)[None, :] * value.to(tl.float32)
                found += 1
        if found > 0:
            y_at = y_ptr + rows[:, None] * y_stride + cols[None, :]
            y = tl.load(y_at, mask=keep, other=0.0).to(tl.float32)
            tl.store(y_at, (y + total).to(y_ptr.dtype.element_ty), mask=keep)


def pair_rotation(
    before: torch.Tensor,
    y: torch.Tensor,
    sine: torch.Tensor,
    groups: torch.Tensor,
    table: SegmentTable,
) -> None:
    """Add what the rows' outputs get from their partners, one rounding to the dtype of ``y``.

    Args:
        before: What the base gave, ``[num_rows, out]``, fp16, bf16 or fp32; rows may be strided.
        y: ``[num_rows, out]``, dtype of ``before``; rows may be strided. Not the memory of
            ``before``.
        sine: By slot of the pack, ``[num_slots, out]`` fp32; rows may be strided.
        groups: Outputs of a group, by slot of the pack, ``[num_slots]`` int32; may be strided. 0
            for adapters without pairs.
        table: The step's segments.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("before", before)
    check_rows("before", before)
    num_rows, width = before.shape
    check_float("y", y, before.dtype)
    check_shape("y", y, num_rows, width)
    check_rows("y", y)
    check_float("sine", sine, torch.float32)
    check_shape("sine", sine, -1, width)
    check_rows("sine", sine)
    check_shape("groups", groups, sine.shape[0])
    for position in (TILES, ONE_ROW) if table.gemv else (TILES,):
        pair_rotation_kernel[(tuning(y.device).programs,)](
            before,
            y,
            sine,
            groups,
            table.buffer,
            before.stride(0),
            y.stride(0),
            sine.stride(0),
            groups.stride(0),
            width,
            LIST=position,
            BLOCK_M=TILE_ROWS,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
