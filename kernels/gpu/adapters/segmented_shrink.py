"""Triton form of ``segmented_shrink``: every adapted row onto the rank space of its adapters.

Bound by the bytes of A. A program takes one item of the segment table (a chunk of rows, 16 ranks of
one of its components), one slice and one part of the input features, so that a decode step of a few
adapters still fills the device. The parts are added up by expand, in their order, without atomics.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.shared.contract import (
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
)
from turret.kernels.gpu.shared.dots import dot
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.gpu.tables.segment_table import (
    CHUNKS,
    RANK_TILE,
    RECORD,
    TILE_ROWS,
    SegmentTable,
)

# Most parts of a shrink; few, because expand reads each rank once per part.
_MAX_SPLITS = 16
_CHUNKS, _RECORD = tl.constexpr(CHUNKS), tl.constexpr(RECORD)


@triton.jit
def shrink_items(
    first,  # work of the list that this program takes first, and
    step,  # how far it is to the next
    x_ptr, a_ptr, slice_ranks_ptr, v_ptr, table_ptr, x_stride, in_features, v_stride,
    NUM_SLICES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute a program's share of a shrink; the arguments are the kernel's."""
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
        # Ranks of this tile that the adapter has in this slice: 0 for a missing slice.
        held = tl.load(slice_ranks_ptr + slot * NUM_SLICES + s) - rank_in_adapter
        held = tl.minimum(held, rank_end - rank)

        rows = tl.load(rows_ptr + position + m, mask=m < count, other=0).to(tl.int64)
        x_rows = x_ptr + rows[:, None] * x_stride
        a_rows = a_ptr + ((rank + r).to(tl.int64) * NUM_SLICES + s)[:, None] * in_features
        start = split * split_width
        # Skip the loads of a missing slice.
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
    """The arguments of ``segmented_shrink`` but for the rows; see there."""

    a: torch.Tensor
    slice_ranks: torch.Tensor
    table: SegmentTable

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return segmented_shrink(x, self.a, self.slice_ranks, self.table)


def rank_activations(table: SegmentTable, num_slices: int, device: torch.device) -> torch.Tensor:
    """An undefined tensor in place of rank activations, for a step without ranks."""
    return torch.empty(1, table.rank_capacity * num_slices, dtype=torch.float32, device=device)


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
            contiguous; 0 where the slice is missing. Nothing past them is read.
        table: The step's segments, loaded.

    Returns:
        ``[splits, rank_capacity · num_slices]``, fp32, laid out as ``segment_table`` says with the
        slice innermost; the sum over the first axis is ``v``. Places of no row are undefined.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract. Values on the device are not
            checked: that would synchronise.
    """
    check_shrink(x, a, slice_ranks)
    num_slices, in_features = a.shape[1:]
    tuned = tuning(x.device)
    v = empty_parts(table, num_slices, in_features, x.device)
    splits, width = v.shape
    segmented_shrink_kernel[(tuned.programs,)](
        x,
        a,
        slice_ranks,
        v,
        table.buffer,
        x.stride(0),
        in_features,
        width,
        NUM_SLICES=num_slices,
        SPLITS=splits,
        BLOCK_M=TILE_ROWS,
        BLOCK_R=RANK_TILE,
        BLOCK_K=tuned.shrink_block_k,
        # Two warps suffice for two tiles of eight ranks: more warps would repeat their
        # products.
        num_warps=2,
        num_stages=3,
        enable_fp_fusion=True,
    )
    return v


def empty_parts(
    table: SegmentTable, num_slices: int, in_features: int, device: torch.device
) -> torch.Tensor:
    """Allocate the result of a shrink of this many inputs; its first axis is the splits."""
    splits, width = shrink_parts(in_features, device), table.rank_capacity * num_slices
    return torch.empty(splits, width, dtype=torch.float32, device=device)


def shrink_parts(in_features: int, device: torch.device) -> int:
    """Number of parts into which a shrink cuts this many inputs."""
    # Depend only on the projection's width: the order of a row's sum may not vary between steps.
    parts = triton.cdiv(in_features, tuning(device).shrink_split_k)
    return max(2, min(_MAX_SPLITS, parts))


def check_shrink(x: torch.Tensor, a: torch.Tensor, slice_ranks: torch.Tensor) -> None:
    """Raise ValueError unless ``segmented_shrink`` can take these."""
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
