"""Low-rank updates: shrink onto the rank space of a row's adapters, and expand from there.

Shrink is bound by reading A. A program processes one item of the segment table (a chunk of rows and
16 ranks of one of its components), one slice and one part of the inputs, so that a decode step of a
few adapters still fills the device. Expand adds up the parts in their order, without atomics.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.common import (
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
    codes_on,
    dot,
    is_last,
    split_dot,
    tuning,
)
from turret.kernels.gpu.nf4 import (
    check_product,
    counters_on,
    multiply_columns,
    options_of,
    parts_of,
    store_sums,
)
from turret.kernels.gpu.tables import CHUNKS, RANK_TILE, RECORD, TILE_ROWS, SegmentTable
from turret.kernels.nf4_matmul import BLOCK, Nf4Matrix

# Maximum number of parts of a shrink. It is small, because expand reads each rank once per part.
_MAX_SPLITS = 16
_CHUNKS, _RECORD = tl.constexpr(CHUNKS), tl.constexpr(RECORD)


@triton.jit
def shrink_items(
    first,  # index of this program's first item in the work list
    step,  # distance to its next item
    x_ptr, a_ptr, slice_ranks_ptr, v_ptr, table_ptr, x_stride, in_features, v_stride,
    NUM_SLICES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute a program's share of a shrink; for the other arguments, see the kernel below."""
    num_work = tl.load(table_ptr + _CHUNKS + 2) * NUM_SLICES * SPLITS
    rows_ptr = table_ptr + tl.load(table_ptr + 1)
    items_ptr = table_ptr + tl.load(table_ptr + _CHUNKS + 3)
    split_width = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLITS) * BLOCK_K
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    for work in range(first, num_work, step):
        split = work % SPLITS
        s = (work // SPLITS) % NUM_SLICES
        item_ptr = items_ptr + (work // (SPLITS * NUM_SLICES)) * _RECORD
        position = tl.load(item_ptr)
        count = tl.load(item_ptr + 1)
        rank = tl.load(item_ptr + 2)
        rank_end = tl.load(item_ptr + 3)
        slot = tl.load(item_ptr + 4)
        v_base = tl.load(item_ptr + 5)
        row_stride = tl.load(item_ptr + 6)
        rank_in_adapter = tl.load(item_ptr + 7)
        # Number of ranks of this tile that the adapter has in this slice; at most 0 if the adapter
        # does not change the slice.
        held = tl.load(slice_ranks_ptr + slot * NUM_SLICES + s) - rank_in_adapter
        held = tl.minimum(held, rank_end - rank)

        rows = tl.load(rows_ptr + position + m, mask=m < count, other=0).to(tl.int64)
        x_rows = x_ptr + rows[:, None] * x_stride
        a_rows = a_ptr + ((rank + r).to(tl.int64) * NUM_SLICES + s)[:, None] * in_features
        start = split * split_width
        # Skip the loads if the adapter has no ranks here.
        end = tl.where(held > 0, tl.minimum(start + split_width, in_features), start)
        acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for k0 in tl.range(start, end, BLOCK_K, num_stages=STAGES):
            cols = k0 + k
            inside = cols < in_features
            x = tl.load(
                x_rows + cols[None, :], mask=(m < count)[:, None] & inside[None, :], other=0.0
            )
            a = tl.load(
                a_rows + cols[None, :], mask=(r < held)[:, None] & inside[None, :], other=0.0
            )
            acc = dot(x, tl.trans(a), acc)
        ranks = (v_base + m * row_stride)[:, None].to(tl.int64) + r[None, :]
        v_split = v_ptr + split.to(tl.int64) * v_stride
        keep = (m < count)[:, None] & (r < rank_end - rank)[None, :]
        tl.store(v_split + ranks * NUM_SLICES + s, acc, mask=keep)


@triton.jit
def segmented_shrink_kernel(
    x_ptr,  # [num_rows, in_features]
    a_ptr,  # [pack_rank, NUM_SLICES, in_features]
    slice_ranks_ptr,  # [num_slots, NUM_SLICES] int32
    v_ptr,  # [SPLITS, rank_capacity * NUM_SLICES] fp32
    table_ptr,  # [capacity] int32
    x_stride,
    in_features,
    v_stride,
    NUM_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    shrink_items(
        tl.program_id(0), tl.num_programs(0), x_ptr, a_ptr, slice_ranks_ptr, v_ptr, table_ptr,
        x_stride, in_features, v_stride, NUM_SLICES, SPLITS, BLOCK_M, BLOCK_R, BLOCK_K,
        None,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shrink:
    """The arguments of ``segmented_shrink`` other than the rows."""

    a: torch.Tensor
    slice_ranks: torch.Tensor
    table: SegmentTable

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return segmented_shrink(x, self.a, self.slice_ranks, self.table)


def segmented_shrink(
    x: torch.Tensor, a: torch.Tensor, slice_ranks: torch.Tensor, table: SegmentTable
) -> torch.Tensor:
    """Shrink all adapted rows of a step.

    Semantics, for every row, component ``k`` of its mix, slice ``s``, ``n = slice_ranks[k, s]``
    and ``[lo, hi)`` the ranks of ``k``::

        v[row, k, :n, s] = x[row] @ a[lo:lo+n, s]ᵀ         v[row, k, n:hi-lo, s] = 0

    Args:
        x: Activations, ``[num_rows, in_features]``, fp16, bf16 or fp32; rows may be strided.
        a: Packed A of one fused projection, ``[pack_rank, num_slices, in_features]``, dtype of
            ``x``, contiguous.
        slice_ranks: Ranks of each slot's adapter in each slice, ``[num_slots, num_slices]`` int32,
            contiguous; 0 for a slice that the adapter does not change. Further ranks are not read.
        table: The step's segments, loaded.

    Returns:
        ``[splits, rank_capacity · num_slices]``, fp32, in the layout of ``tables.py`` with the
        slice innermost. The sum over the first axis is ``v``. Positions without a row are
        undefined.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract. Values on the device are not
            checked, because that would synchronise.
    """
    check_shrink(x, a, slice_ranks)
    num_slices, in_features = a.shape[1:]
    v = empty_parts(table.rank_capacity * num_slices, in_features, x.device)
    segmented_shrink_kernel[(tuning(x.device).programs,)](
        x,
        a,
        slice_ranks,
        v,
        table.buffer,
        x.stride(0),
        in_features,
        v.shape[1],
        NUM_SLICES=num_slices,
        SPLITS=v.shape[0],
        **shrink_options(x.device),
    )
    return v


def empty_parts(width: int, in_features: int, device: torch.device) -> torch.Tensor:
    """Allocate the result of a shrink, ``[splits, width]`` fp32."""
    # The number of splits depends only on the projection's inputs, so that the order of a row's sum
    # is the same in every step.
    splits = max(2, min(_MAX_SPLITS, triton.cdiv(in_features, tuning(device).shrink_split_k)))
    return torch.empty(splits, width, dtype=torch.float32, device=device)


def shrink_options(device: torch.device) -> dict[str, Any]:
    """Compile and launch options of kernels that only shrink."""
    return {
        "BLOCK_M": TILE_ROWS,
        "BLOCK_R": RANK_TILE,
        "BLOCK_K": tuning(device).shrink_block_k,
        # Two warps suffice for two tiles of eight ranks: further warps would repeat their products.
        "num_warps": 2,
        "num_stages": 3,
        "enable_fp_fusion": True,
    }


def check_shrink(x: torch.Tensor, a: torch.Tensor, slice_ranks: torch.Tensor) -> None:
    """Raise ValueError unless ``segmented_shrink`` supports these arguments."""
    check_float("x", x)
    check_float("a", a, x.dtype)
    check_shape("a", a, -1, -1, -1)
    check_shape("x", x, -1, a.shape[2])
    check_rows("x", x)
    check_contiguous("a", a)
    check_shape("slice_ranks", slice_ranks, -1, a.shape[1])
    check_contiguous("slice_ranks", slice_ranks)
    if slice_ranks.dtype != torch.int32:
        raise ValueError(f"slice_ranks is {slice_ranks.dtype}; torch.int32 is needed")


# ``segmented_expand`` applies the gain, the biases and all updates of a row in one pass.
#
# All terms are added to the base result in fp32, with one rounding. A program processes a chunk of
# rows and a tile of columns of one slice, and adds up the parts of shrink's reduction as it reads
# them. Components are added in the request's order, so the result is deterministic and does not
# depend on the batch.

MAX_SLICES = 3


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
    first_column,  # first column of the slice in y
    out,  # columns of the slice
    start,  # first column of the tile in the slice
    NUM_SLICES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute the final result of one chunk of rows in one tile of columns of one slice."""
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
            # The rows of a chunk share a mix and thus a gain.
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
    """Apply gains, biases and low-rank updates to the base's result of a projection, in place.

    Semantics, per row with mix ``{(k, w_k)}`` and slice ``s``, all in fp32, one rounding::

        G = 1 + Σ_k w_k gain_delta[k]
        Δ_k = v[row, k, :, s] b_s[k] + bias[k]
        y[row, s] = G ⊙ y[row, s] + base_bias + Σ_k w_k · gate_k · Δ_k      gate_k: 1 if not gated

    Args:
        y: Bias-free base results, ``[num_rows, sum(out_s)]``, fp16, bf16 or fp32; rows may be
            strided.
        v: Result of ``segmented_shrink`` for the same table.
        b: Packed B per slice, ``[pack_rank, out_s]``, dtype of ``y``, contiguous; 1 to 3 slices.
        slice_ranks: See ``segmented_shrink``.
        table: The step's segments. Rows outside of all segments, and base rows without a
            ``base_bias``, are neither read nor written.
        gain_delta: ``g − 1`` per slot, ``[num_slots, sum(out_s)]`` fp32, contiguous, or None.
        bias: The bias that each slot's adapter adds, in the same form, or None.
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
    """Raise ValueError unless ``segmented_expand`` supports these arguments."""
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


# The base's product and ``segmented_shrink`` in one launch: both read the projection's input.
#
# The first programs process the shrink's work list, and the others are those of ``nf4_matmul``. The
# factors of a shrink, a few hundredths of the weight's bytes, are read during the product, and one
# launch is saved. The bits are those of the two separate kernels, which use two warps as well.

_BLOCK = tl.constexpr(BLOCK)


@triton.jit(do_not_specialize=["num_rows", "part_blocks"])
def nf4_shrink_kernel(
    x_ptr,  # [at least num_rows, in_features]
    packed_ptr,  # as in nf4_matmul
    codes_ptr,
    absmax_ptr,
    y_ptr,  # [num_rows, out_features]
    parts_ptr,  # [SPLITS, num_rows, out_features] fp32, or None
    counters_ptr,
    a_ptr,  # as in segmented_shrink
    slice_ranks_ptr,
    v_ptr,
    table_ptr,
    num_rows,  # number of rows that the base multiplies
    x_stride,
    in_features,
    out_features,
    part_blocks,
    v_stride,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHRINK_PROGRAMS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    SHRINK_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    if program < SHRINK_PROGRAMS:
        shrink_items(
            program, SHRINK_PROGRAMS, x_ptr, a_ptr, slice_ranks_ptr, v_ptr, table_ptr, x_stride,
            in_features, v_stride, NUM_SLICES, SHRINK_SPLITS, BLOCK_M, BLOCK_R, BLOCK_K,
            3,
        )  # fmt: skip
    else:
        columns = tl.cdiv(out_features, BLOCK_N)
        tile = (program - SHRINK_PROGRAMS) % columns
        split = (program - SHRINK_PROGRAMS) // columns
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < out_features
        begin = split * part_blocks
        to = y_ptr
        if parts_ptr is not None:
            to = parts_ptr + split.to(tl.int64) * num_rows * out_features
        multiply_columns(
            x_ptr, packed_ptr, codes_ptr, absmax_ptr, to, n, inside, begin,
            tl.minimum(begin + part_blocks, in_features // _BLOCK), num_rows, x_stride, in_features,
            out_features, ROWS, BLOCK_N,
        )  # fmt: skip
        if parts_ptr is not None:  # noqa: SIM102
            if is_last(counters_ptr + tile, SPLITS):
                store_sums(
                    y_ptr, parts_ptr, n, inside, num_rows, out_features, out_features, SPLITS,
                    False,
                )  # fmt: skip


def nf4_shrink(
    x: torch.Tensor,
    num_rows: int,
    weight: Nf4Matrix,
    shrink: Shrink,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply the first rows by the base's weight, and shrink all adapted rows.

    Launches share counters with those of ``nf4_matmul``, so all of them must use one stream.

    Args:
        x: ``[rows, in_features]``, fp16, bf16 or fp32; rows may be strided.
        num_rows: The number of rows that the base multiplies, at most 64.
        weight: See ``nf4_matmul``.
        shrink: The arguments of the shrink.

    Returns:
        The results of ``nf4_matmul`` on the first rows and of ``segmented_shrink`` on all rows,
        bit for bit.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_product(x[:num_rows], weight)
    a, slice_ranks, table = shrink.a, shrink.slice_ranks, shrink.table
    check_shrink(x, a, slice_ranks)
    tuned, in_features, out_features = tuning(x.device), x.shape[1], weight.out_features
    columns = triton.cdiv(out_features, tuned.nf4_block_n)
    splits, part_blocks = parts_of(out_features, in_features // BLOCK, tuned)
    y = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    shape = (splits, num_rows, out_features)
    parts = torch.empty(shape, dtype=torch.float32, device=x.device) if splits > 1 else None
    v = empty_parts(table.rank_capacity * a.shape[1], in_features, x.device)
    nf4_shrink_kernel[(tuned.shrink_programs + columns * splits,)](
        x,
        weight.packed,
        codes_on(x.device, x.dtype),
        weight.absmax,
        y,
        parts,
        counters_on(x.device),
        a,
        slice_ranks,
        v,
        table.buffer,
        num_rows,
        x.stride(0),
        in_features,
        out_features,
        part_blocks,
        v.shape[1],
        SPLITS=splits,
        SHRINK_PROGRAMS=tuned.shrink_programs,
        NUM_SLICES=a.shape[1],
        SHRINK_SPLITS=v.shape[0],
        BLOCK_M=TILE_ROWS,
        BLOCK_R=RANK_TILE,
        BLOCK_K=tuned.shrink_block_k,
        **options_of(num_rows, tuned),
    )
    return y, v
