"""Triton form of ``input_blocks``: ``u += Σ_k w_k D_k x`` per row, in place.

A program takes a tile of rows that share a mix and a tile of inputs, and walks along the blocks'
rows: the blocks are read once for the tile's rows. Which adapters have blocks of this shape a map
says, by their slots in the pack. ``gained_add`` adds what the base made of one member's ``u``,
under that member's own gain.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.adapters.input_gain import ANY_ROWS, takes_chunk
from turret.kernels.gpu.shared.contract import (
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
)
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.gpu.tables.segment_table import ONE_ROW, RECORD, TILE_ROWS, TILES, SegmentTable

_RECORD = tl.constexpr(RECORD)
_BLOCK = 128
ALL = -1


@triton.jit(do_not_specialize=["taken", "bit"])
def input_blocks_kernel(
    x_ptr,  # [num_rows, width]
    u_ptr,  # [num_rows, width]
    blocks_ptr,  # [slots, count, size, size]
    places_ptr,  # [pack slots] int32: slot here, or -1
    table_ptr,
    x_stride,
    width,
    count,
    size,
    nth,
    taken,  # rows
    bit,
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
        first = cols // size * size  # of the column's block
        block = tl.where(count > 1, cols // size, 0).to(tl.int64) * size * size + cols % size
        total = tl.zeros((BLOCK_M, BLOCK), dtype=tl.float32)
        found = 0
        for c in range(tl.load(chunk_ptr + 2), tl.load(chunk_ptr + 3)):
            slot = tl.load(places_ptr + tl.load(components_ptr + c * _RECORD + 2)).to(tl.int64)
            weight = tl.load(components_ptr + c * _RECORD + 4).to(tl.float32, bitcast=True)
            if slot >= 0:
                if (nth < 0) | (found == nth):
                    own_ptr = blocks_ptr + slot * count * size * size
                    change = tl.zeros((BLOCK_M, BLOCK), dtype=tl.float32)
                    for i in range(0, size):
                        x = tl.load(
                            x_ptr + rows[:, None] * x_stride + (first + i)[None, :],
                            mask=keep,
                            other=0.0,
                        )
                        d = tl.load(own_ptr + block + i * size, mask=inside, other=0.0)
                        change += x.to(tl.float32) * d.to(tl.float32)[None, :]
                    total += weight * change
                found += 1
        if (found > 0) & takes_chunk(chunk_ptr, taken, bit):
            u_at = u_ptr + rows[:, None] * width + cols[None, :]
            before = tl.load(u_at, mask=keep, other=0.0).to(tl.float32)
            tl.store(u_at, (before + total).to(u_ptr.dtype.element_ty), mask=keep)


@triton.jit
def gained_add_kernel(
    y_ptr,  # [num_rows, width], rows y_stride apart
    z_ptr,  # [num_rows, width]
    gain_ptr,  # [pack slots, width] fp32, g - 1, rows gain_stride apart
    places_ptr,
    table_ptr,
    y_stride,
    gain_stride,
    width,
    nth,
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
        gain = tl.zeros((BLOCK,), dtype=tl.float32)
        found = 0
        for c in range(tl.load(chunk_ptr + 2), tl.load(chunk_ptr + 3)):
            slot = tl.load(components_ptr + c * _RECORD + 2).to(tl.int64)
            if tl.load(places_ptr + slot) >= 0:
                if found == nth:
                    own = tl.load(gain_ptr + slot * gain_stride + cols, mask=inside, other=0.0)
                    gain = 1.0 + own
                found += 1
        if found > nth:
            y_at = y_ptr + rows[:, None] * y_stride + cols[None, :]
            z = tl.load(z_ptr + rows[:, None] * width + cols[None, :], mask=keep, other=0.0)
            y = tl.load(y_at, mask=keep, other=0.0).to(tl.float32)
            y += gain[None, :] * z.to(tl.float32)
            tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=keep)


def input_blocks(
    x: torch.Tensor,
    u: torch.Tensor,
    blocks: torch.Tensor,
    places: torch.Tensor,
    table: SegmentTable,
    nth: int = ALL,
    *,
    taken: int = ANY_ROWS,
    bit: int = 0,
) -> None:
    """Add what blocks make of the rows' inputs, one rounding to the dtype of ``u``.

    Args:
        x: Activations, ``[num_rows, in]``, fp16, bf16 or fp32; rows may be strided.
        u: ``[num_rows, in]``, dtype of ``x``, contiguous. Rows without such an adapter stay.
        blocks: ``[num_slots, in / b, b, b]``, or ``[num_slots, 1, b, b]``; dtype of ``x``,
            contiguous.
        places: Slot of every adapter of the pack, by its slot there, or -1; int32.
        table: The step's segments.
        nth: The member of a mix that counts among those with a place, or ``ALL``.
        taken: Rows that change, see ``input_gain``; the others stay.
        bit: The projection's, of ``LongSegment.as_is``.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("x", x)
    check_rows("x", x)
    num_rows, width = x.shape
    check_float("u", u, x.dtype)
    check_shape("u", u, num_rows, width)
    check_contiguous("u", u)
    check_float("blocks", blocks, x.dtype)
    check_contiguous("blocks", blocks)
    count, size = blocks.shape[1:3]
    check_shape("blocks", blocks, -1, -1, size, size)
    if width % size or (count != 1 and count * size != width):
        raise ValueError(f"{count} blocks of {size} do not make {width} inputs")
    for position in (TILES, ONE_ROW) if table.gemv else (TILES,):
        input_blocks_kernel[(tuning(x.device).programs,)](
            x,
            u,
            blocks,
            places,
            table.buffer,
            x.stride(0),
            width,
            count,
            size,
            nth,
            taken,
            bit,
            LIST=position,
            BLOCK_M=TILE_ROWS,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )


def gained_add(
    y: torch.Tensor,
    z: torch.Tensor,
    gain_delta: torch.Tensor,
    places: torch.Tensor,
    table: SegmentTable,
    nth: int,
) -> None:
    """``y += g ⊙ z`` in place, ``g`` the gain of each row's ``nth`` member with a place.

    Args:
        y: ``[num_rows, out]``, fp16, bf16 or fp32; rows may be strided (a slice of a fused
            projection).
        z: ``[num_rows, out]``, dtype of ``y``, contiguous.
        gain_delta: ``g − 1`` by slot of the pack, ``[num_slots, out]`` fp32; rows may be strided.
        places: See ``input_blocks``.
        table: The step's segments.
        nth: Which member.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("y", y)
    check_rows("y", y)
    num_rows, width = y.shape
    check_float("z", z, y.dtype)
    check_shape("z", z, num_rows, width)
    check_contiguous("z", z)
    check_float("gain_delta", gain_delta, torch.float32)
    check_shape("gain_delta", gain_delta, -1, width)
    check_rows("gain_delta", gain_delta)
    for position in (TILES, ONE_ROW) if table.gemv else (TILES,):
        gained_add_kernel[(tuning(y.device).programs,)](
            y,
            z,
            gain_delta,
            places,
            table.buffer,
            y.stride(0),
            gain_delta.stride(0),
            width,
            nth,
            LIST=position,
            BLOCK_M=TILE_ROWS,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
