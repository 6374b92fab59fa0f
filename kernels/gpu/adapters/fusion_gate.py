"""Triton form of ``fusion_gate``: weights per row, slice and component, between shrink and expand.

A program takes a chunk of rows of the segment table and one slice. Both scores of the reference are
forms of one kernel.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.shared.contract import check_contiguous, check_float, check_shape
from turret.kernels.gpu.shared.dots import split_dot
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.gpu.tables.segment_table import (
    ONE_ROW,
    RANK_TILE,
    RECORD,
    TILE_ROWS,
    TILES,
    SegmentTable,
)

_RECORD = tl.constexpr(RECORD)


@triton.jit
def _score(
    q_ptr,  # [num_rows, NUM_SLICES, d_k] fp32, at the slice
    rows,
    live,
    v_ptr,  # rank activations of the chunk's first row, this component and slice
    v_stride,
    row_stride,
    keys_ptr,  # [pack_rank, NUM_SLICES, d_k] at the component's first rank and the slice
    num_ranks,
    d_k,
    NUM_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``q · (Wk B) v`` of one component, ``[BLOCK_M]`` fp32."""
    m = tl.arange(0, BLOCK_M)
    score = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for j in range(0, num_ranks, BLOCK_R):
        ranks = j + tl.arange(0, BLOCK_R)
        held = ranks < num_ranks
        products = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for d0 in range(0, d_k, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            inside = d < d_k
            q_at = q_ptr + (rows * NUM_SLICES * d_k)[:, None] + d[None, :]
            q = tl.load(q_at, mask=live[:, None] & inside[None, :], other=0.0)
            keys_at = keys_ptr + ranks[None, :] * (NUM_SLICES * d_k) + d[:, None]
            keys = tl.load(keys_at, mask=held[None, :] & inside[:, None], other=0.0)
            products = split_dot(q, keys, products)
        at = (m[:, None] * row_stride + ranks[None, :]) * NUM_SLICES
        keep = live[:, None] & held[None, :]
        v = tl.load(v_ptr + at, mask=keep, other=0.0)
        for split in tl.static_range(1, SPLITS):
            v += tl.load(v_ptr + split * v_stride + at, mask=keep, other=0.0)
        score += tl.sum(products * v, axis=1)
    return score


@triton.jit
def _similarity(
    q_ptr,  # [num_rows, NUM_SLICES, width] fp32, at the slice and the component's slot
    rows,
    live,
    width,
    NUM_SLICES: tl.constexpr,
):
    """``|p x|`` of one component, ``[BLOCK_M]`` fp32."""
    return tl.abs(tl.load(q_ptr + rows * (NUM_SLICES * width), mask=live, other=0.0))


@triton.jit
def _before(
    scores,  # [BLOCK_M, BLOCK_C] by position
    q_ptr,  # [num_rows, NUM_SLICES, width] fp32, at the slice
    rows,
    live,
    components_ptr,
    gated_ptr,
    begin,
    end,
    width,
    NUM_SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """How many components come before each: the more similar, and of equals the first."""
    columns = tl.arange(0, BLOCK_C)[None, :]
    before = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32)
    for c in range(begin, end):
        slot = tl.load(components_ptr + c * _RECORD + 2)
        if tl.load(gated_ptr + slot) != 0:
            other = _similarity(q_ptr + slot, rows, live, width, NUM_SLICES)[:, None]
            tied = (other == scores) & (columns > c - begin)
            before += ((other > scores) | tied).to(tl.int32)
    return before


@triton.jit
def fusion_gate_kernel(
    q_ptr,  # [num_rows, NUM_SLICES, d_k] fp32; if ROUTED, similarities by slot
    v_ptr,  # [SPLITS, rank_capacity * NUM_SLICES] fp32
    keys_ptr,  # [pack_rank, NUM_SLICES, d_k]
    gated_ptr,  # [num_slots] int32
    gates_ptr,  # [num_rows, NUM_SLICES, max_components] fp32
    table_ptr,
    d_k,
    v_stride,
    max_components,
    top_k,
    temperature,
    NUM_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    LIST: tl.constexpr,
    ROUTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows_ptr = table_ptr + tl.load(table_ptr + 1)
    components_ptr = table_ptr + tl.load(table_ptr + 2)
    chunks_ptr = table_ptr + tl.load(table_ptr + LIST + 1)
    num_work = tl.load(table_ptr + LIST) * NUM_SLICES
    m = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_C)
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        s = work % NUM_SLICES
        chunk_ptr = chunks_ptr + (work // NUM_SLICES) * _RECORD
        begin = tl.load(chunk_ptr + 2)
        end = tl.load(chunk_ptr + 3)
        live = m < tl.load(chunk_ptr + 1)
        # 32 bits everywhere: the wrapper holds sizes below 2³¹, and 64 would not fit in registers.
        rows = tl.load(rows_ptr + tl.load(chunk_ptr) + m, mask=live, other=0)
        v_base = tl.load(chunk_ptr + 4)
        row_stride = tl.load(chunk_ptr + 5)
        scores = tl.full((BLOCK_M, BLOCK_C), float("-inf"), dtype=tl.float32)
        for c in range(begin, end):
            component_ptr = components_ptr + c * _RECORD
            rank = tl.load(component_ptr)
            slot = tl.load(component_ptr + 2)
            if tl.load(gated_ptr + slot) != 0:
                if ROUTED:
                    score = _similarity(q_ptr + s * d_k + slot, rows, live, d_k, NUM_SLICES)
                else:
                    score = _score(
                        q_ptr + s * d_k, rows, live,
                        v_ptr + (v_base + tl.load(component_ptr + 3)) * NUM_SLICES + s,
                        v_stride, row_stride, keys_ptr + (rank * NUM_SLICES + s) * d_k,
                        tl.load(component_ptr + 1) - rank, d_k,
                        NUM_SLICES, SPLITS, BLOCK_M, BLOCK_R, BLOCK_D,
                    )  # fmt: skip
                scores = tl.where(columns[None, :] == c - begin, score[:, None], scores)
        gated = scores != float("-inf")
        if ROUTED:
            before = _before(
                scores, q_ptr + s * d_k, rows, live, components_ptr, gated_ptr,
                begin, end, d_k, NUM_SLICES, BLOCK_M, BLOCK_C,
            )  # fmt: skip
            scores = tl.where(before < top_k, scores / temperature, float("-inf"))
        top = tl.max(scores, axis=1)
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp(scores - top[:, None])
        total = tl.sum(weights, axis=1)
        # Components that are not gated keep their mix weight as it is.
        gates = tl.where(gated, weights / tl.where(total == 0.0, 1.0, total)[:, None], 1.0)
        at = (rows * NUM_SLICES + s)[:, None] * max_components + columns[None, :]
        keep = live[:, None] & (columns < max_components)[None, :]
        tl.store(gates_ptr + at, gates, mask=keep)


def fusion_gate(
    q: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    gated: torch.Tensor,
    table: SegmentTable,
) -> torch.Tensor:
    """Compute the gates of a step.

    Args:
        q: Queries, ``[num_rows, num_slices, d_k]`` fp32, contiguous (rows without a gated
            component are not read).
        v: Result of ``segmented_shrink`` for the same table.
        keys: ``(Wk B_k)ᵀ`` by pack rank, ``[pack_rank, num_slices, d_k]``, fp16, bf16 or fp32,
            contiguous.
        gated: Whether a slot belongs to a fusion, ``[num_slots]`` int32. The gated components of a
            mix share one softmax; the others get 1.
        table: The step's segments.

    Returns:
        ``[num_rows, num_slices, max_components]`` fp32, by position in the row's mix, for
        ``segmented_expand``. Rows in no run of the table are undefined.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    num_slices, d_k = keys.shape[1:]
    check_shape("q", q, -1, num_slices, d_k)
    check_float("q", q, torch.float32)
    check_float("keys", keys)
    check_shape("v", v, -1, table.rank_capacity * num_slices)
    _check(gated, q=q, v=v, keys=keys)
    return _launch(q, v, keys, gated, table)


def routing_gate(
    similarities: torch.Tensor,
    gated: torch.Tensor,
    table: SegmentTable,
    top_k: int,
    temperature: float,
) -> torch.Tensor:
    """Compute the gates of a step by prototypes.

    Args:
        similarities: ``p_k · x`` by slot, ``[num_rows, num_slices, num_slots]`` fp32, contiguous
            (rows without a gated component are not read).
        gated: Whether a slot belongs to a router, ``[num_slots]`` int32. The gated components of a
            mix compete; the others get 1.
        table: The step's segments.
        top_k: Components that share a row's weight, at least 1.
        temperature: What similarities are divided by, above 0.

    Returns:
        As ``fusion_gate``.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_shape("similarities", similarities, -1, -1, gated.shape[0])
    check_float("similarities", similarities, torch.float32)
    _check(gated, similarities=similarities)
    if top_k < 1 or temperature <= 0.0:
        raise ValueError(f"top_k is {top_k} and temperature {temperature}; both are above 0")
    routing = top_k, temperature
    return _launch(similarities, None, None, gated, table, routing)


def _check(gated: torch.Tensor, **tensors: torch.Tensor) -> None:
    for name, values in (*tensors.items(), ("gated", gated)):
        check_contiguous(name, values)
    if gated.dtype != torch.int32:
        raise ValueError(f"gated is {gated.dtype}; torch.int32 is needed")
    for name, values in tensors.items():
        if values.numel() >= 1 << 31:
            raise ValueError(f"{name} has {values.numel()} elements; 2³¹ are too many")


def _launch(
    q: torch.Tensor,
    v: torch.Tensor | None,
    keys: torch.Tensor | None,
    gated: torch.Tensor,
    table: SegmentTable,
    routing: tuple[int, float] | None = None,
) -> torch.Tensor:
    num_rows, num_slices, width = q.shape
    shape = (num_rows, num_slices, table.max_components)
    gates = torch.empty(shape, dtype=torch.float32, device=q.device)
    top_k, temperature = routing or (0, 1.0)
    tuned = tuning(q.device)
    for position in (TILES, ONE_ROW) if table.gemv else (TILES,):
        fusion_gate_kernel[(tuned.programs,)](
            q,
            # Where prototypes decide, neither of the two is read.
            q if v is None else v,
            q if keys is None else keys,
            gated,
            gates,
            table.buffer,
            width,
            0 if v is None else v.shape[1],
            table.max_components,
            top_k,
            temperature,
            NUM_SLICES=num_slices,
            SPLITS=1 if v is None else v.shape[0],
            LIST=position,
            ROUTED=routing is not None,
            BLOCK_M=TILE_ROWS,
            BLOCK_C=triton.next_power_of_2(table.max_components),
            BLOCK_R=RANK_TILE,
            BLOCK_D=32,
            num_warps=4,
            num_stages=3,
            **tuned.registers(255),
            enable_fp_fusion=True,
        )
    return gates
