"""Triton forms around the base's product of ``modulated_base``: ``Σ_r b_r ⊙ W (a_r ⊙ x)``.

``modulate`` makes the rows that the base multiplies, some ranks at a time, ``modulated_add`` adds
what it made of them. A program takes a tile of rows that share a mix and a tile of columns.
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
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.gpu.tables.segment_table import ONE_ROW, RECORD, TILE_ROWS, TILES, SegmentTable

_RECORD = tl.constexpr(RECORD)
_BLOCK = 128


@triton.jit
def _member(components_ptr, places_ptr, first, last, nth):
    """Slot of the ``nth`` component with a place, or -1, and its weight."""
    slot = -1
    weight = 0.0
    found = 0
    for c in range(first, last):
        place = tl.load(places_ptr + tl.load(components_ptr + c * _RECORD + 2))
        if place >= 0:
            if found == nth:
                slot = place
                weight = tl.load(components_ptr + c * _RECORD + 4).to(tl.float32, bitcast=True)
            found += 1
    return slot, weight


@triton.jit
def modulate_kernel(
    x_ptr,  # [num_rows, width]
    u_ptr,  # [count, num_rows, width], zeros
    a_ptr,  # [slots, rank, width]
    places_ptr,  # [pack slots] int32: slot here, or -1
    table_ptr,
    x_stride,
    u_stride,
    width,
    rank,
    first,
    count,
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
        low, high = tl.load(chunk_ptr + 2), tl.load(chunk_ptr + 3)
        slot, _weight = _member(components_ptr, places_ptr, low, high, nth)
        if slot >= 0:
            x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=keep, other=0.0)
            own = a_ptr + (slot.to(tl.int64) * rank + first) * width + cols
            for r in range(0, count):
                a = tl.load(own + r * width, mask=inside, other=0.0).to(tl.float32)
                u = x.to(tl.float32) * a[None, :]
                u_at = u_ptr + r * u_stride + rows[:, None] * width + cols[None, :]
                tl.store(u_at, u.to(u_ptr.dtype.element_ty), mask=keep)


@triton.jit
def modulated_add_kernel(
    y_ptr,  # [num_rows, width]
    z_ptr,  # [count, num_rows, width]
    b_ptr,  # [slots, rank, width]
    places_ptr,
    table_ptr,
    y_stride,
    z_stride,
    width,
    rank,
    first,
    count,
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
        low, high = tl.load(chunk_ptr + 2), tl.load(chunk_ptr + 3)
        slot, weight = _member(components_ptr, places_ptr, low, high, nth)
        if slot >= 0:
            total = tl.zeros((BLOCK_M, BLOCK), dtype=tl.float32)
            own = b_ptr + (slot.to(tl.int64) * rank + first) * width + cols
            for r in range(0, count):
                b = tl.load(own + r * width, mask=inside, other=0.0).to(tl.float32)
                z_at = z_ptr + r * z_stride + rows[:, None] * width + cols[None, :]
                z = tl.load(z_at, mask=keep, other=0.0)
                total += z.to(tl.float32) * b[None, :]
            y_at = y_ptr + rows[:, None] * y_stride + cols[None, :]
            y = tl.load(y_at, mask=keep, other=0.0).to(tl.float32)
            tl.store(y_at, (y + weight * total).to(y_ptr.dtype.element_ty), mask=keep)


def modulate(
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: slice,
    places: torch.Tensor,
    table: SegmentTable,
    nth: int,
) -> torch.Tensor:
    """``a_r ⊙ x`` of the rows with such an adapter, zeros for the others.

    Args:
        x: Activations, ``[num_rows, in]``, fp16, bf16 or fp32; rows may be strided.
        a: ``[num_slots, rank, in]``, dtype of ``x``, contiguous.
        ranks: Which.
        places: Slot of every adapter of the pack, by its slot there, or -1; int32.
        table: The step's segments.
        nth: The member of a mix that counts among those with a place.

    Returns:
        ``[ranks, num_rows, in]``, dtype of ``x``, contiguous.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("x", x)
    check_rows("x", x)
    num_rows, width = x.shape
    check_float("a", a, x.dtype)
    check_shape("a", a, -1, -1, width)
    check_contiguous("a", a)
    count = ranks.stop - ranks.start
    u = torch.zeros(count, num_rows, width, dtype=x.dtype, device=x.device)
    for position in (TILES, ONE_ROW) if table.gemv else (TILES,):
        modulate_kernel[(tuning(x.device).programs,)](
            x,
            u,
            a,
            places,
            table.buffer,
            x.stride(0),
            num_rows * width,
            width,
            a.shape[1],
            ranks.start,
            count,
            nth,
            LIST=position,
            BLOCK_M=TILE_ROWS,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return u


def modulated_add(
    y: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    ranks: slice,
    places: torch.Tensor,
    table: SegmentTable,
    nth: int,
) -> None:
    """``y += w Σ_r b_r ⊙ z_r`` in place, one rounding to the dtype of ``y``.

    Args:
        y: ``[num_rows, out]``, fp16, bf16 or fp32; rows may be strided.
        z: What the base made of ``modulate``'s rows, ``[ranks, num_rows, out]``, dtype of ``y``,
            contiguous.
        b: ``[num_slots, rank, out]``, dtype of ``y``, contiguous.
        ranks: Which.
        places: As above.
        table: The step's segments.
        nth: As above.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("y", y)
    check_rows("y", y)
    num_rows, width = y.shape
    count = ranks.stop - ranks.start
    check_float("z", z, y.dtype)
    check_shape("z", z, count, num_rows, width)
    check_contiguous("z", z)
    check_float("b", b, y.dtype)
    check_shape("b", b, -1, -1, width)
    check_contiguous("b", b)
    for position in (TILES, ONE_ROW) if table.gemv else (TILES,):
        modulated_add_kernel[(tuning(y.device).programs,)](
            y,
            z,
            b,
            places,
            table.buffer,
            y.stride(0),
            num_rows * width,
            width,
            b.shape[1],
            ranks.start,
            count,
            nth,
            LIST=position,
            BLOCK_M=TILE_ROWS,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
