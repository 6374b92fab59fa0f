"""The result of an expand in some columns, for kernels that continue with it.

The formula is that of ``segmented_expand``, whose kernel has it in a form of its own: registers
there are few.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from turret.kernels.gpu.adapters.segmented_expand import add_update
from turret.kernels.gpu.tables.segment_table import RECORD

_RECORD = tl.constexpr(RECORD)


@triton.jit
def slice_at(
    tile, tiles0, tiles1, b0_ptr, b1_ptr, b2_ptr, out0, out1, out2, NUM_SLICES: tl.constexpr
):
    """The slice a tile is in: number, first tile, first column, columns and B."""
    s = (tile >= tiles0).to(tl.int32) + (tile >= tiles1).to(tl.int32)
    first_tile = tl.where(s == 0, 0, tl.where(s == 1, tiles0, tiles1))
    first_column = tl.where(s == 0, 0, tl.where(s == 1, out0, out0 + out1))
    out = tl.where(s == 0, out0, tl.where(s == 1, out1, out2))
    b_ptr = b0_ptr
    if NUM_SLICES > 1 and s == 1:
        b_ptr = b1_ptr
    if NUM_SLICES > 2 and s == 2:
        b_ptr = b2_ptr
    return s, first_tile, first_column, out, b_ptr


@triton.jit
def chunk_rows(table_ptr, chunk_ptr, BLOCK_M: tl.constexpr):
    """Rows of a chunk, ``[BLOCK_M]`` int64, and which of them there are."""
    m = tl.arange(0, BLOCK_M)
    live = m < tl.load(chunk_ptr + 1)
    rows_ptr = table_ptr + tl.load(table_ptr + 1) + tl.load(chunk_ptr)
    return tl.load(rows_ptr + m, mask=live, other=0).to(tl.int64), live


@triton.jit
def expanded(
    y_ptr, v_ptr, b_ptr, slice_ranks_ptr, gain_delta_ptr, bias_ptr, base_bias_ptr, gates_ptr,
    table_ptr, chunk_ptr, rows, live, y_stride, v_stride, gates_stride, gates_slice_stride, width,
    s, first_column, out,
    cols,  # [BLOCK_N], of the slice
    NUM_SLICES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The finished result of one chunk of rows in some columns of one slice, in the dtype of y."""
    begin = tl.load(chunk_ptr + 2)
    end = tl.load(chunk_ptr + 3)
    components_ptr = table_ptr + tl.load(table_ptr + 2)
    inside = cols < out
    y_cols = first_column + cols
    keep = live[:, None] & inside[None, :]
    # Load this first although it is used last, to hide the latency.
    base = tl.load((y_ptr + rows * y_stride)[:, None] + y_cols[None, :], mask=keep, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    gain = tl.full((BLOCK_N,), 1.0, dtype=tl.float32)
    v_base = tl.load(chunk_ptr + 4).to(tl.int64)
    row_stride = tl.load(chunk_ptr + 5)
    for c in range(begin, end):
        component_ptr = components_ptr + c * _RECORD
        rank = tl.load(component_ptr).to(tl.int64)
        slot = tl.load(component_ptr + 2)
        weight = tl.load(component_ptr + 4).to(tl.float32, bitcast=True)
        held = tl.load(slice_ranks_ptr + slot * NUM_SLICES + s)
        num_ranks = tl.minimum((tl.load(component_ptr + 1) - rank).to(tl.int32), held)
        scale = tl.zeros((BLOCK_M,), dtype=tl.float32) + weight
        if gates_ptr is not None:
            is_gated = tl.load(component_ptr + 5) != 0
            if is_gated:
                gate_at = gates_ptr + rows * gates_stride + s * gates_slice_stride + (c - begin)
                scale *= tl.load(gate_at, mask=live, other=0.0)
        if gain_delta_ptr is not None:
            delta = tl.load(gain_delta_ptr + slot * width + y_cols, mask=inside, other=0.0)
            gain += weight * delta
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + slot * width + y_cols, mask=inside, other=0.0)
            acc += scale[:, None] * bias[None, :]
        v_at = v_ptr + (v_base + tl.load(component_ptr + 3)) * NUM_SLICES + s
        acc = add_update(
            acc, v_at, v_stride, row_stride, scale, b_ptr + rank * out, out, num_ranks, live,
            cols, inside, NUM_SLICES, SPLITS, BLOCK_M, BLOCK_R,
        )  # fmt: skip
    base = base.to(tl.float32)
    if gain_delta_ptr is not None:
        # All rows of a chunk have the same mix.
        base = base * gain[None, :]
    if base_bias_ptr is not None:
        base_bias = tl.load(base_bias_ptr + y_cols, mask=inside, other=0.0)
        base += base_bias.to(tl.float32)[None, :]
    return (base + acc).to(y_ptr.dtype.element_ty)
