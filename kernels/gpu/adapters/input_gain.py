"""Triton form of the input gain: ``x ⊙ Σ_k w_k (l_k − 1)`` per row and slice of a projection.

It is IA3's (arXiv 2205.05638) and LN tuning's.

What the base multiplies in place of ``x``, or on top of it: ``W (l ⊙ x) = W x + W ((l − 1) ⊙ x)``.
The second is exact beside any other operator of the mix, the first where nothing else of the mix
needs ``W x`` itself. The reference is ``row_combine`` in ``kernels/rows/gain.py``.
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
# Which rows a change of inputs is made for: all; those whose base result nothing else needs, so
# that the base can multiply the changed input; the others. By ``LongSegment.as_is``.
ANY_ROWS, FREE_ROWS, BOUND_ROWS = range(3)


@triton.jit
def takes_chunk(chunk_ptr, rows, bit):
    """Whether the rows of a chunk are among ``rows`` in the projection of a bit."""
    bound = (tl.load(chunk_ptr + 6) >> bit) & 1
    return (rows == 0) | (bound == rows - 1)


@triton.jit(do_not_specialize=["num_rows", "slices", "taken", "bit", "whole"])
def input_gain_kernel(
    x_ptr,  # [num_rows, width]
    delta_ptr,  # [num_slots, slices, width] fp32
    out_ptr,  # [slices, num_rows, width]
    table_ptr,
    num_rows,
    slices,
    x_stride,
    slot_stride,  # of delta
    slice_stride,
    width,
    taken,  # rows
    bit,
    whole,  # 1: x and its change, 0: the change alone
    LIST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(width, BLOCK)
    rows_ptr = table_ptr + tl.load(table_ptr + 1)
    components_ptr = table_ptr + tl.load(table_ptr + 2)
    chunks_ptr = table_ptr + tl.load(table_ptr + LIST + 1)
    pieces = slices * tiles
    num_work = tl.load(table_ptr + LIST) * pieces
    m = tl.arange(0, BLOCK_M)
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        chunk_ptr = chunks_ptr + (work // pieces) * _RECORD
        index = work % pieces // tiles
        live = m < tl.load(chunk_ptr + 1)
        rows = tl.load(rows_ptr + tl.load(chunk_ptr) + m, mask=live, other=0).to(tl.int64)
        cols = (work % tiles) * BLOCK + tl.arange(0, BLOCK)
        inside = cols < width
        delta = tl.zeros((BLOCK,), dtype=tl.float32)
        for c in range(tl.load(chunk_ptr + 2), tl.load(chunk_ptr + 3)):
            slot = tl.load(components_ptr + c * _RECORD + 2).to(tl.int64)
            weight = tl.load(components_ptr + c * _RECORD + 4).to(tl.float32, bitcast=True)
            own_ptr = delta_ptr + slot * slot_stride + index * slice_stride
            gain = tl.load(own_ptr + cols, mask=inside, other=0.0)
            delta += weight * gain
        keep = live[:, None] & inside[None, :]
        delta = tl.where(takes_chunk(chunk_ptr, taken, bit), delta, 0.0) + whole.to(tl.float32)
        # Where nothing changes, nothing is multiplied: an infinite x must not become NaN.
        changes = keep & (delta != 0.0)[None, :]
        x_at = x_ptr + rows[:, None] * x_stride + cols[None, :]
        x = tl.load(x_at, mask=changes, other=0.0).to(tl.float32)
        out_at = out_ptr + (index * num_rows + rows)[:, None] * width + cols[None, :]
        tl.store(out_at, (x * delta[None, :]).to(out_ptr.dtype.element_ty), mask=keep)


def input_gain(
    x: torch.Tensor,
    delta: torch.Tensor,
    table: SegmentTable,
    *,
    taken: int = ANY_ROWS,
    bit: int = 0,
    whole: bool = False,
) -> torch.Tensor:
    """Scale the rows of a step by what their mixes add to the input gain 1, or by all of it.

    Args:
        x: Activations, ``[num_rows, width]``, fp16, bf16 or fp32; rows may be strided.
        delta: ``l − 1`` per slot and slice, ``[num_slots, slices, width]`` fp32; may be strided but
            for the last dimension.
        table: The step's segments.
        taken: Rows whose gain counts; the others are as if they had none.
        bit: The projection's, of ``LongSegment.as_is``.
        whole: Give ``l ⊙ x``, not ``(l − 1) ⊙ x``.

    Returns:
        ``[slices, num_rows, width]``, dtype of ``x``, contiguous; zero for rows without an input
        gain, ``whole`` their bits of ``x``. Rows in no run of the table are undefined.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("x", x)
    check_rows("x", x)
    num_rows, width = x.shape
    check_float("delta", delta, torch.float32)
    check_shape("delta", delta, -1, -1, width)
    check_rows("delta", delta)
    slices = delta.shape[1]
    out = torch.empty(slices, num_rows, width, dtype=x.dtype, device=x.device)
    for position in (TILES, ONE_ROW) if table.gemv else (TILES,):
        input_gain_kernel[(tuning(x.device).programs,)](
            x,
            delta,
            out,
            table.buffer,
            num_rows,
            slices,
            x.stride(0),
            delta.stride(0),
            delta.stride(1),
            width,
            taken,
            bit,
            int(whole),
            LIST=position,
            BLOCK_M=TILE_ROWS,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
