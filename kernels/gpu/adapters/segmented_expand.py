"""Triton form of ``segmented_expand`` with the whole epilogue of an adapted projection.

One pass over the base result: gain, biases and all updates of a row are added in fp32 and rounded
once. A program takes a chunk of rows and a tile of columns of one slice; it adds the parts of
shrink's reduction up as it reads them. Components come in the request's order, so the result is
deterministic and does not depend on the batch.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Sequence

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
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.gpu.tables.segment_table import (
    CHUNKS,
    RANK_TILE,
    RECORD,
    TILE_ROWS,
    SegmentTable,
)

MAX_SLICES = 3
_CHUNKS, _RECORD = tl.constexpr(CHUNKS), tl.constexpr(RECORD)


@triton.jit
def add_update(
    acc,
    v_ptr,  # rank activations of the chunk's first row in this slice
    v_stride,
    row_stride,
    scale,  # [BLOCK_M] fp32: mix weight, times the row's gate
    b_ptr,  # [pack_rank, out] at this component's first rank
    out,
    num_ranks,
    live,
    cols,
    inside,
    NUM_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``acc + (scale v) b`` of one component, ``[BLOCK_M, BLOCK_N]`` fp32."""
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    for j in range(0, num_ranks, BLOCK_R):
        ranks = j + r
        held = ranks < num_ranks
        b = tl.load(
            b_ptr + ranks[:, None] * out + cols[None, :],
            mask=held[:, None] & inside[None, :],
            other=0.0,
        )
        # Small offsets from a 64-bit base need half the registers of 64-bit offsets.
        at = (m[:, None] * row_stride + ranks[None, :]) * NUM_SLICES
        keep = live[:, None] & held[None, :]
        v = tl.load(v_ptr + at, mask=keep, other=0.0)
        for split in tl.static_range(1, SPLITS):
            v += tl.load(v_ptr + split * v_stride + at, mask=keep, other=0.0)
        # Scale v, not the result: a row has fewer ranks here (sixteen) than columns.
        v *= scale[:, None]
        acc = split_dot(v, b, acc)
    return acc


@triton.jit
def segmented_expand_kernel(
    y_ptr,  # [num_rows, width]
    v_ptr,  # [SPLITS, rank_capacity * NUM_SLICES] fp32
    b0_ptr,  # [pack_rank, out0]
    b1_ptr,
    b2_ptr,
    slice_ranks_ptr,  # [num_slots, NUM_SLICES] int32
    gain_delta_ptr,  # [num_slots, width] fp32 or None
    bias_ptr,  # [num_slots, width] fp32 or None
    base_bias_ptr,  # [width] or None
    gates_ptr,  # [num_rows, NUM_SLICES, max_components] fp32 or None
    table_ptr,  # [capacity] int32
    y_stride,
    out0,
    out1,
    out2,
    v_stride,
    gates_stride,
    gates_slice_stride,
    NUM_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tiles0 = tl.cdiv(out0, BLOCK_N)
    tiles1 = tiles0 + tl.cdiv(out1, BLOCK_N)
    tiles = tiles1 + tl.cdiv(out2, BLOCK_N)
    chunks_ptr = table_ptr + tl.load(table_ptr + _CHUNKS + 1)
    num_work = tl.load(table_ptr + _CHUNKS) * tiles
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        tile = work % tiles
        s = (tile >= tiles0).to(tl.int32) + (tile >= tiles1).to(tl.int32)
        first_tile = tl.where(s == 0, 0, tl.where(s == 1, tiles0, tiles1))
        first_column = tl.where(s == 0, 0, tl.where(s == 1, out0, out0 + out1))
        out = tl.where(s == 0, out0, tl.where(s == 1, out1, out2))
        b_ptr = b0_ptr
        if NUM_SLICES > 1 and s == 1:
            b_ptr = b1_ptr
        if NUM_SLICES > 2 and s == 2:
            b_ptr = b2_ptr
        _expand_tile(
            y_ptr,
            v_ptr,
            b_ptr,
            slice_ranks_ptr,
            gain_delta_ptr,
            bias_ptr,
            base_bias_ptr,
            gates_ptr,
            table_ptr,
            chunks_ptr + (work // tiles) * _RECORD,
            y_stride,
            v_stride,
            gates_stride,
            gates_slice_stride,
            out0 + out1 + out2,
            s,
            first_column,
            out,
            (tile - first_tile) * BLOCK_N,
            NUM_SLICES,
            SPLITS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
        )


@triton.jit
def _expand_tile(
    y_ptr, v_ptr, b_ptr, slice_ranks_ptr, gain_delta_ptr, bias_ptr, base_bias_ptr, gates_ptr,
    table_ptr, chunk_ptr, y_stride, v_stride, gates_stride, gates_slice_stride, width,
    s,  # slice
    first_column,  # of the slice in y
    out,  # columns of the slice
    start,  # of the tile in the slice
    NUM_SLICES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Finish one chunk of rows in one tile of columns of one slice."""
    begin = tl.load(chunk_ptr + 2)
    end = tl.load(chunk_ptr + 3)
    # Without an adapter, only the base bias changes a row.
    if base_bias_ptr is not None or end > begin:
        m = tl.arange(0, BLOCK_M)
        live = m < tl.load(chunk_ptr + 1)
        rows_ptr = table_ptr + tl.load(table_ptr + 1) + tl.load(chunk_ptr)
        components_ptr = table_ptr + tl.load(table_ptr + 2)
        rows = tl.load(rows_ptr + m, mask=live, other=0).to(tl.int64)
        cols = start + tl.arange(0, BLOCK_N)
        inside = cols < out
        y_cols = first_column + cols
        y_at = (y_ptr + rows * y_stride)[:, None] + y_cols[None, :]
        keep = live[:, None] & inside[None, :]
        # Load this first although it is used last, to hide the latency.
        base = tl.load(y_at, mask=keep, other=0.0)
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
        tl.store(y_at, (base + acc).to(y_ptr.dtype.element_ty), mask=keep)


def segmented_expand(
    y: torch.Tensor,
    v: torch.Tensor,
    b: Sequence[torch.Tensor],
    slice_ranks: torch.Tensor,
    table: SegmentTable,
    *,
    gain_delta: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    base_bias: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
) -> None:
    """Finish an adapted projection in place.

    Semantics, per row with mix ``{(k, w_k)}`` and slice ``s``, all in fp32, one rounding::

        G = 1 + Σ_k w_k gain_delta[k]
        Δ_k = v[row, k, :, s] b_s[k] + bias[k]
        y[row, s] = G ⊙ y[row, s] + base_bias + Σ_k w_k · gate_k · Δ_k      gate_k: 1 if not gated

    Args:
        y: Bias-free base results, ``[num_rows, sum(out_s)]``, fp16, bf16 or fp32; rows may be
            strided.
        v: Result of ``segmented_shrink`` for the same table.
        b: Packed B per slice, ``[pack_rank, out_s]``, dtype of ``y``, contiguous; 1 to 3 slices.
        slice_ranks: As for ``segmented_shrink``.
        table: The step's segments. Rows in none of them, and base rows where there is no
            ``base_bias``, are neither read nor written.
        gain_delta: ``g − 1`` per slot, ``[num_slots, sum(out_s)]`` fp32, contiguous, or None.
        bias: Bias difference per slot, same form.
        base_bias: The base's bias, ``[sum(out_s)]`` contiguous; added to base rows too (they must
            be in the table as runs without components).
        gates: Result of ``fusion_gate``, ``[num_rows, num_slices, max_components]`` fp32, or None.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_expand(y, v, b, slice_ranks, table, (gain_delta, bias), base_bias, gates)
    tuned = tuning(y.device)
    outs = [slice_b.shape[1] for slice_b in b] + [0] * (MAX_SLICES - len(b))
    pointers = [*b] + [b[0]] * (MAX_SLICES - len(b))
    segmented_expand_kernel[(tuned.programs,)](
        y,
        v,
        *pointers,
        slice_ranks,
        gain_delta,
        bias,
        base_bias,
        gates,
        table.buffer,
        y.stride(0),
        *outs,
        v.shape[1],
        *((0, 0) if gates is None else gates.stride()[:2]),
        NUM_SLICES=len(b),
        SPLITS=v.shape[0],
        BLOCK_M=TILE_ROWS,
        BLOCK_N=tuned.expand_block_n,
        BLOCK_R=RANK_TILE,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )


def check_expand(
    y: torch.Tensor,
    v: torch.Tensor,
    b: Sequence[torch.Tensor],
    slice_ranks: torch.Tensor,
    table: SegmentTable,
    per_slot: tuple[torch.Tensor | None, torch.Tensor | None],
    base_bias: torch.Tensor | None,
    gates: torch.Tensor | None = None,
) -> None:
    """Raise ValueError unless ``segmented_expand`` can take these."""
    if not 1 <= len(b) <= MAX_SLICES:
        raise ValueError(f"{len(b)} slices; 1 to {MAX_SLICES} are supported")
    width = sum(slice_b.shape[1] for slice_b in b)
    check_float("y", y)
    check_shape("y", y, -1, width)
    check_rows("y", y)
    check_shape("v", v, -1, table.rank_capacity * len(b))
    check_float("v", v, torch.float32)
    check_contiguous("v", v)
    for s, slice_b in enumerate(b):
        check_float(f"b[{s}]", slice_b, y.dtype)
        check_shape(f"b[{s}]", slice_b, b[0].shape[0], -1)
        check_contiguous(f"b[{s}]", slice_b)
    check_shape("slice_ranks", slice_ranks, -1, len(b))
    for name, values in zip(("gain_delta", "bias"), per_slot, strict=True):
        if values is not None:
            check_float(name, values, torch.float32)
            check_shape(name, values, slice_ranks.shape[0], width)
            check_contiguous(name, values)
            # Kernels index these tables with 32 bits, because 64-bit indices would not fit in
            # registers.
            if values.numel() >= 1 << 31:
                raise ValueError(f"{name} has {values.numel()} elements; 2³¹ are too many")
    if base_bias is not None:
        check_float("base_bias", base_bias)
        check_shape("base_bias", base_bias, width)
        check_contiguous("base_bias", base_bias)
    if gates is not None:
        check_float("gates", gates, torch.float32)
        check_shape("gates", gates, y.shape[0], len(b), table.max_components)
        check_rows("gates", gates)
