"""``segmented_expand`` and the next operation in one launch: its own result is never written.

A program finishes two tiles of columns that belong together, as ``segmented_expand`` does: gates
and their ups, or the first and second features of the pairs of some heads. What comes next is
computed of both. The bits are those of the kernels one after the other.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.adapters.expand_tile import chunk_rows, expanded, slice_at
from turret.kernels.gpu.adapters.segmented_expand import (
    MAX_SLICES,
    check_expand,
    segmented_expand,
)
from turret.kernels.gpu.kv_write import KvWrite
from turret.kernels.gpu.rope_kv_write import pair_of, store_heads
from turret.kernels.gpu.shared.dependent_launch import wait_for_launches
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.gpu.silu_mul import silu_product
from turret.kernels.gpu.tables.segment_table import (
    RANK_TILE,
    RECORD,
    TILE_ROWS,
    TILES,
    SegmentTable,
)

_RECORD = tl.constexpr(RECORD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expand:
    """The arguments of ``segmented_expand``, gates left out; see there."""

    y: torch.Tensor
    v: torch.Tensor
    b: Sequence[torch.Tensor]
    slice_ranks: torch.Tensor
    table: SegmentTable
    gain_delta: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    base_bias: torch.Tensor | None = None

    def run(self, gates: torch.Tensor | None = None) -> None:
        """Finish ``y`` in place, components weighed by gates if there are some."""
        segmented_expand(
            self.y,
            self.v,
            self.b,
            self.slice_ranks,
            self.table,
            gain_delta=self.gain_delta,
            bias=self.bias,
            base_bias=self.base_bias,
            gates=gates,
        )

    def check(self) -> None:
        """Raise ValueError where it breaks the contract, or the table has one-row chunks."""
        per_slot = self.gain_delta, self.bias
        check_expand(self.y, self.v, self.b, self.slice_ranks, self.table, per_slot, self.base_bias)
        if self.table.gemv:
            raise ValueError("the table has a list of one-row chunks; segmented_expand takes those")


@triton.jit
def expand_gated_kernel(
    y_ptr,  # these as in segmented_expand
    v_ptr,
    b0_ptr,
    b1_ptr,
    slice_ranks_ptr,
    gain_delta_ptr,
    bias_ptr,
    base_bias_ptr,
    out_ptr,  # [num_rows, width]
    table_ptr,
    y_stride,
    width,  # of the gates, and of the ups
    v_stride,
    SPLITS: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    wait_for_launches()
    tiles = tl.cdiv(width, BLOCK_N)
    chunks_ptr = table_ptr + tl.load(table_ptr + LIST + 1)
    num_work = tl.load(table_ptr + LIST) * tiles
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        chunk_ptr = chunks_ptr + (work // tiles) * _RECORD
        rows, live = chunk_rows(table_ptr, chunk_ptr, BLOCK_M)
        cols = (work % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        gate = expanded(
            y_ptr, v_ptr, b0_ptr, slice_ranks_ptr, gain_delta_ptr, bias_ptr, base_bias_ptr, None,
            table_ptr, chunk_ptr, rows, live, y_stride, v_stride, 0, 0, 2 * width, 0, 0, width,
            cols, 2, SPLITS, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        up = expanded(
            y_ptr, v_ptr, b1_ptr, slice_ranks_ptr, gain_delta_ptr, bias_ptr, base_bias_ptr, None,
            table_ptr, chunk_ptr, rows, live, y_stride, v_stride, 0, 0, 2 * width, 1, width, width,
            cols, 2, SPLITS, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        product = silu_product(gate.to(tl.float32), up.to(tl.float32))
        out_at = (out_ptr + rows * width)[:, None] + cols[None, :]
        keep = live[:, None] & (cols < width)[None, :]
        tl.store(out_at, product.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def expand_rotated_kernel(
    y_ptr,  # these as in segmented_expand
    v_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    slice_ranks_ptr,
    gain_delta_ptr,
    bias_ptr,
    base_bias_ptr,
    cos_ptr,  # these as in rope_kv_write
    sin_ptr,
    kv_slots_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    y_stride,
    out0,
    out1,
    out2,
    v_stride,
    num_heads,
    kv_heads,
    pairs,
    NUM_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    HALF: tl.constexpr,
    PARTIAL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of a tile of first features, and of one of second ones
    BLOCK_R: tl.constexpr,
):
    wait_for_launches()
    tile_heads: tl.constexpr = BLOCK_N // HALF
    tiles0 = tl.cdiv(out0, 2 * BLOCK_N)
    tiles1 = tiles0 + tl.cdiv(out1, 2 * BLOCK_N)
    tiles = tiles1 + tl.cdiv(out2, 2 * BLOCK_N)
    chunks_ptr = table_ptr + tl.load(table_ptr + LIST + 1)
    num_work = tl.load(table_ptr + LIST) * tiles
    pair = tl.arange(0, BLOCK_N)
    h = pair % HALF
    i, j = pair_of(h, HALF, pairs, PARTIAL, INTERLEAVED)
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        chunk_ptr = chunks_ptr + (work // tiles) * _RECORD
        rows, live = chunk_rows(table_ptr, chunk_ptr, BLOCK_M)
        s, first_tile, first_column, out, b_ptr = slice_at(
            work % tiles, tiles0, tiles1, b0_ptr, b1_ptr, b2_ptr, out0, out1, out2, NUM_SLICES
        )
        head = (work % tiles - first_tile) * tile_heads + pair // HALF
        first = expanded(
            y_ptr, v_ptr, b_ptr, slice_ranks_ptr, gain_delta_ptr, bias_ptr, base_bias_ptr, None,
            table_ptr, chunk_ptr, rows, live, y_stride, v_stride, 0, 0, out0 + out1 + out2, s,
            first_column, out, head * 2 * HALF + i, NUM_SLICES, SPLITS, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        second = expanded(
            y_ptr, v_ptr, b_ptr, slice_ranks_ptr, gain_delta_ptr, bias_ptr, base_bias_ptr, None,
            table_ptr, chunk_ptr, rows, live, y_stride, v_stride, 0, 0, out0 + out1 + out2, s,
            first_column, out, head * 2 * HALF + j, NUM_SLICES, SPLITS, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        # Heads past the slice belong to another tile.
        none = num_heads + 2 * kv_heads
        head = tl.where(head * 2 * HALF < out, first_column // (2 * HALF) + head, none)
        store_heads(
            first.to(tl.float32), second.to(tl.float32), rows, live, head, h, i, j, cos_ptr,
            sin_ptr, kv_slots_ptr, q_ptr, k_cache_ptr, v_cache_ptr, num_heads, kv_heads, HALF,
            pairs,
        )  # fmt: skip


def expand_gated(expand: Expand) -> torch.Tensor:
    """Finish gates and ups, multiply the silu of the ones by the others.

    Args:
        expand: Of two slices of one width; every row is in its table.

    Returns:
        ``[num_rows, width]``, dtype of ``y``: the bits of ``segmented_expand`` and ``silu_mul`` one
        after the other. ``y`` is not changed.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    expand.check()
    widths = [b.shape[1] for b in expand.b]
    if len(widths) != 2 or widths[0] != widths[1]:
        raise ValueError(f"slices of {widths} columns; gates and as many ups are needed")
    y, tuned = expand.y, tuning(expand.y.device)
    out = torch.empty(y.shape[0], widths[0], dtype=y.dtype, device=y.device)
    expand_gated_kernel[(tuned.programs,)](
        y,
        expand.v,
        *expand.b,
        expand.slice_ranks,
        expand.gain_delta,
        expand.bias,
        expand.base_bias,
        out,
        expand.table.buffer,
        y.stride(0),
        widths[0],
        expand.v.shape[1],
        SPLITS=expand.v.shape[0],
        LIST=TILES,
        BLOCK_M=TILE_ROWS,
        BLOCK_N=tuned.expand_block_n // 2,
        BLOCK_R=RANK_TILE,
        num_warps=4,
        num_stages=1,
        **tuned.early(),
        enable_fp_fusion=True,
    )
    return out


def expand_rotated(expand: Expand, write: KvWrite) -> torch.Tensor:
    """Finish queries, keys and values, turn the heads, store keys and values.

    Args:
        expand: Of heads of queries, of keys and of values, a slice each or all in one; every row
            is in its table.
        write: Of all rows; a tile of columns holds whole heads (``can_rotate``).

    Returns:
        Rotated queries, ``[num_rows, num_heads, head_dim]``, dtype of the cache: the bits of
        ``segmented_expand`` and ``rope_kv_write`` one after the other. ``y`` is not changed.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    expand.check()
    y, tuned = expand.y, tuning(expand.y.device)
    write.check(*y.shape)
    outs = [b.shape[1] for b in expand.b] + [0] * (MAX_SLICES - len(expand.b))
    if not can_rotate(expand, write):
        raise ValueError(f"heads of {write.head_dim} do not divide slices of {outs} columns")
    q = write.empty_queries(*y.shape)
    expand_rotated_kernel[(tuned.programs,)](
        y,
        expand.v,
        *[*expand.b, *[expand.b[0]] * (MAX_SLICES - len(expand.b))],
        expand.slice_ranks,
        expand.gain_delta,
        expand.bias,
        expand.base_bias,
        write.cos,
        write.sin,
        write.kv_slots,
        q,
        write.k_cache,
        write.v_cache,
        expand.table.buffer,
        y.stride(0),
        *outs,
        expand.v.shape[1],
        write.num_heads(y.shape[1]),
        write.kv_heads,
        write.pairs,
        NUM_SLICES=len(expand.b),
        SPLITS=expand.v.shape[0],
        HALF=write.head_dim // 2,
        PARTIAL=write.is_partial,
        INTERLEAVED=write.is_interleaved,
        LIST=TILES,
        BLOCK_M=TILE_ROWS,
        BLOCK_N=tuned.expand_block_n // 2,
        BLOCK_R=RANK_TILE,
        num_warps=4,
        num_stages=1,
        # Limit registers to fit four programs on a multiprocessor, as ``programs`` assumes.
        **(tuned.registers(128) if write.head_dim == 64 else {}),
        **tuned.early(),
        enable_fp_fusion=True,
    )
    return q


def can_rotate(expand: Expand, write: KvWrite) -> bool:
    """Whether tiles of columns hold whole heads, and so do slices, and all features turn.

    Heads that turn in part take more registers than there are.
    """
    whole = write.divides(tuning(expand.y.device).expand_block_n) and not write.is_partial
    return whole and all(b.shape[1] % write.head_dim == 0 for b in expand.b)
