"""Triton form of ``fusion_gate``: weights per row, slice and component, between shrink and expand.

A program takes a gate of the segment table (a chunk of rows, the components of one adapter) and one
slice. Learned fusions, routers, and what a first pass tells are branches of one launch: the table
by slot says which a gate takes.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.gates import gate_words
from turret.kernels.gpu.gates.gate_shrink import check_words
from turret.kernels.gpu.shared.addresses import pointer_to
from turret.kernels.gpu.shared.contract import check_contiguous, check_float, check_shape
from turret.kernels.gpu.shared.dots import dot
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.gpu.tables.segment_table import (
    GATE_RECORD,
    GATES,
    RANK_TILE,
    RECORD,
    TILE_ROWS,
    SegmentTable,
)

_RECORD, _GATE_RECORD = tl.constexpr(RECORD), tl.constexpr(GATE_RECORD)
_GATES = tl.constexpr(GATES)
_WORDS, _KEYS = tl.constexpr(gate_words.WORDS), tl.constexpr(gate_words.KEYS)
_KIND, _VECTORS = tl.constexpr(gate_words.KIND), tl.constexpr(gate_words.VECTORS)
_TOP_K, _TEMPERATURE = tl.constexpr(gate_words.TOP_K), tl.constexpr(gate_words.TEMPERATURE)
_MODULE = tl.constexpr(gate_words.MODULE)
_QUERY, _PROTOTYPE = tl.constexpr(gate_words.QUERY), tl.constexpr(gate_words.PROTOTYPE)
_TOLD = tl.constexpr(gate_words.TOLD)


@triton.jit
def _parts(ptr, at, stride, keep, SPLITS: tl.constexpr):
    """The sum of the parts of a shrink at some places, in their order."""
    total = tl.load(ptr + at, mask=keep, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(ptr + split * stride + at, mask=keep, other=0.0)
    return total


@triton.jit
def _score(
    asked_ptr,  # queries of the gate's first row, in the slice
    asked_stride,
    asked_row,
    live,
    v_ptr,  # rank activations of the chunk's first row, this component and slice
    v_stride,
    row_stride,
    keys_ptr,  # [ranks, d_k] fp32, at the component's first rank
    num_ranks,
    d_k,
    NUM_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``q · (Wk B) v`` of one component, ``[BLOCK_M]`` fp32."""
    m = tl.arange(0, BLOCK_M)[:, None]
    score = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for j in range(0, num_ranks, BLOCK_R):
        ranks = j + tl.arange(0, BLOCK_R)
        held = ranks < num_ranks
        products = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for d0 in range(0, d_k, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            inside = d < d_k
            q_at = (m * asked_row + d[None, :]) * NUM_SLICES
            keep = live[:, None] & inside[None, :]
            q = _parts(asked_ptr, q_at, asked_stride, keep, SPLITS)
            keys_at = keys_ptr + ranks[None, :] * d_k + d[:, None]
            keys = tl.load(keys_at, mask=held[None, :] & inside[:, None], other=0.0)
            products = dot(q, keys, products)
        v_at = (m * row_stride + ranks[None, :]) * NUM_SLICES
        v = _parts(v_ptr, v_at, v_stride, live[:, None] & held[None, :], SPLITS)
        score += tl.sum(products * v, axis=1)
    return score


@triton.jit
def _fused(
    scores,  # [BLOCK_M, BLOCK_C]
    asked_ptr,  # in the slice
    asked_stride,
    v_ptr,  # in the slice
    v_stride,
    own_ptr,  # the gate's words
    gate_ptr,
    component_ptr,  # the gate's first
    live,
    NUM_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The score of every component of a learned fusion in its column of ``scores``."""
    columns = tl.arange(0, BLOCK_C)[None, :]
    d_k = tl.load(own_ptr + _VECTORS).to(tl.int32)
    asked_at = asked_ptr + tl.load(gate_ptr + 8) * NUM_SLICES
    keys_ptr = pointer_to(tl.load(own_ptr + _KEYS), asked_ptr)
    first = tl.load(component_ptr)
    for c in range(tl.load(gate_ptr + 3)):
        own = component_ptr + c * _RECORD
        rank = tl.load(own)
        v_at = v_ptr + (tl.load(gate_ptr + 6) + tl.load(own + 3)) * NUM_SLICES
        score = _score(
            asked_at, asked_stride, tl.load(gate_ptr + 9), live, v_at, v_stride,
            tl.load(gate_ptr + 7), keys_ptr + (rank - first) * d_k, tl.load(own + 1) - rank, d_k,
            NUM_SLICES, SPLITS, BLOCK_M, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        scores = tl.where(columns == c, score[:, None], scores)
    return scores


@triton.jit
def _column(scores, c, BLOCK_C: tl.constexpr):
    """One component's column, ``[BLOCK_M]``: the others are masked, so the sum is its value."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_C)[None, :] == c, scores, 0.0), axis=1)


@triton.jit
def _routed(
    keep,  # [BLOCK_M, BLOCK_C]
    asked_ptr,  # similarities of the gate's rows to its first component, in the slice
    asked_stride,
    own_ptr,  # the gate's words
    count,
    NUM_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The scores of a router's softmax, ``[BLOCK_M, BLOCK_C]``; −inf for those outside top-k."""
    columns = tl.arange(0, BLOCK_C)[None, :]
    found = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    # Add the parts one after the other: all at once would not fit in registers.
    for split in tl.range(0, SPLITS, loop_unroll_factor=1):
        at = asked_ptr[:, None] + split * asked_stride + columns * NUM_SLICES
        found += tl.load(at, mask=keep, other=0.0)
    scores = tl.where(keep, tl.abs(found), float("-inf"))
    # Count the components that rank before each: more similar ones, and earlier ones of equals.
    before = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32)
    for c in range(count):
        other = _column(scores, c, BLOCK_C)[:, None]
        tied = (other == scores) & (columns > c)
        before += ((other > scores) | tied).to(tl.int32)
    temperature = tl.load(own_ptr + _TEMPERATURE).to(tl.int32).to(tl.float32, bitcast=True)
    kept = keep & (before < tl.load(own_ptr + _TOP_K))
    return tl.where(kept, scores / temperature, float("-inf"))


@triton.jit
def _softmax(scores, count, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Softmax of each row, ignoring −inf. Components are added one by one, in a fixed order."""
    top = tl.max(scores, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(scores - top[:, None])
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for c in range(count):
        total += _column(weights, c, BLOCK_C)
    return weights / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def fusion_gate_kernel(
    asked_ptr,  # [SPLITS, asked_capacity * NUM_SLICES] fp32
    v_ptr,  # [SPLITS, rank_capacity * NUM_SLICES] fp32
    told_ptr,  # [told] fp32 or None
    words_ptr,  # [num_slots, NUM_SLICES, WORDS] int64
    gates_ptr,  # [num_rows, NUM_SLICES, max_components] fp32
    table_ptr,
    asked_stride,
    v_stride,
    max_components,
    NUM_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows_ptr = table_ptr + tl.load(table_ptr + 1)
    components_ptr = table_ptr + tl.load(table_ptr + 2)
    list_ptr = table_ptr + tl.load(table_ptr + _GATES + 1)
    m = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_C)
    for work in range(
        tl.program_id(0), tl.load(table_ptr + _GATES) * NUM_SLICES, tl.num_programs(0)
    ):
        s = work % NUM_SLICES
        gate_ptr = list_ptr + (work // NUM_SLICES) * _GATE_RECORD
        live = m < tl.load(gate_ptr + 1)
        # Use 32-bit indices: the wrapper rejects sizes from 2³¹ on, and 64 bits would not fit in
        # registers.
        rows = tl.load(rows_ptr + tl.load(gate_ptr) + m, mask=live, other=0)
        component_ptr = components_ptr + tl.load(gate_ptr + 2) * _RECORD
        count = tl.load(gate_ptr + 3)
        own_ptr = words_ptr + (tl.load(gate_ptr + 5) * NUM_SLICES + s) * _WORDS
        kind = tl.load(own_ptr + _KIND)
        keep = live[:, None] & (columns < count)[None, :]
        # A slice without a gate has no ranks, so its components' weights do not matter.
        scores = tl.where(keep, 0.0, float("-inf"))
        if kind == _TOLD:
            if told_ptr is not None:
                at = tl.load(gate_ptr + 10) + tl.load(own_ptr + _MODULE).to(tl.int32) * count
                at += rows * tl.load(gate_ptr + 11)
                scores = tl.load(told_ptr + at[:, None] + columns[None, :], mask=keep, other=0.0)
        elif kind == _QUERY:
            scores = _fused(
                scores, asked_ptr + s, asked_stride, v_ptr + s, v_stride, own_ptr, gate_ptr,
                component_ptr, live, NUM_SLICES, SPLITS, BLOCK_M, BLOCK_C, BLOCK_R, BLOCK_D,
            )  # fmt: skip
            scores = _softmax(scores, count, BLOCK_M, BLOCK_C)
        elif kind == _PROTOTYPE:
            asked_at = tl.load(gate_ptr + 8) + m * tl.load(gate_ptr + 9)
            scores = _routed(
                keep, asked_ptr + asked_at * NUM_SLICES + s, asked_stride, own_ptr, count,
                NUM_SLICES, SPLITS, BLOCK_M, BLOCK_C,
            )  # fmt: skip
            scores = _softmax(scores, count, BLOCK_M, BLOCK_C)
        at = (rows * NUM_SLICES + s)[:, None] * max_components
        at += (tl.load(gate_ptr + 4) + columns)[None, :]
        tl.store(gates_ptr + at, scores, mask=keep)


def fusion_gate(
    asked: torch.Tensor,
    v: torch.Tensor,
    words: torch.Tensor,
    table: SegmentTable,
    num_rows: int,
    told: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the gates of a step.

    Args:
        asked: Result of ``gate_shrink`` for the same table.
        v: Result of ``segmented_shrink`` for the same table.
        words: Of the gates by slot, as for ``gate_shrink``.
        table: The step's segments. The gated members of a mix that are one adapter's share one
            softmax.
        num_rows: Rows of the step.
        told: What first passes have told, flat, fp32: of a row from ``GatedMembers.told`` on, the
            components of each module. None where no adapter of the step is told its gates.

    Returns:
        ``[num_rows, num_slices, max_components]`` fp32, by position in the row's mix, for
        ``segmented_expand``. Undefined for members that are not gated.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_words(words)
    num_slices = words.shape[1]
    check_shape("v", v, -1, table.rank_capacity * num_slices)
    check_shape("asked", asked, v.shape[0], table.asked_capacity * num_slices)
    shape = (num_rows, num_slices, table.max_components)
    gates = torch.empty(shape, dtype=torch.float32, device=v.device)
    found = {"asked": asked, "v": v, "gates": gates} | ({} if told is None else {"told": told})
    for name, values in found.items():
        check_float(name, values, torch.float32)
        check_contiguous(name, values)
        if values.numel() >= 1 << 31:
            raise ValueError(f"{name} has {values.numel()} elements; 2³¹ are too many")
    tuned = tuning(v.device)
    fusion_gate_kernel[(tuned.programs,)](
        asked,
        v,
        told,
        words,
        gates,
        table.buffer,
        asked.shape[1],
        v.shape[1],
        table.max_components,
        NUM_SLICES=num_slices,
        SPLITS=v.shape[0],
        BLOCK_M=TILE_ROWS,
        BLOCK_C=triton.next_power_of_2(table.max_components),
        BLOCK_R=RANK_TILE,
        BLOCK_D=16,
        num_warps=4,
        num_stages=1,
        **tuned.registers(255),
        enable_fp_fusion=True,
    )
    return gates
