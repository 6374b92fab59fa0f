"""Triton form of ``fusion_gate_reference``: the weights of a learned fusion's components.

There are two launches for all gated adapters of a step. ``gate_shrink`` multiplies rows by queries,
``q = Wq x``, in a separate shrink: a program processes a query item of the segment table (a chunk
of rows, 16 vectors of their adapter), one slice and one part of the input features. ``fusion_gate``
computes the scores and from them the weights: a program processes a gate of the table (a chunk of
rows, the components of one adapter) and one slice.

Queries and keys are in each adapter's own memory and are found by their addresses, so a step's
launches do not depend on how adapters differ. A slot's words for a slice are int64 (``@`` marks an
address)::

    query@ · keys@ · d_k · 0

For a module without a gate these words are zeros, and its components have no ranks.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.fusion_gate import MAX_COMPONENTS
from turret.kernels.gpu.common import (
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
    dot,
    pointer_to,
    tuning,
)
from turret.kernels.gpu.low_rank import empty_parts, shrink_options
from turret.kernels.gpu.tables import GATE_RECORD, GATES, RANK_TILE, RECORD, TILE_ROWS, SegmentTable

WORDS = 4
_RECORD, _GATE_RECORD = tl.constexpr(RECORD), tl.constexpr(GATE_RECORD)
_GATES, _WORDS = tl.constexpr(GATES), tl.constexpr(WORDS)
# The fields of a slot's words, and of the records that ``tables.py`` describes, in their order.
(_QUERY, _KEYS, _D_K, _) = map(tl.constexpr, range(WORDS))
(_POSITION, _COUNT, _COMPONENT, _COMPONENTS, _COLUMN, _SLOT, _V_BASE, _V_STRIDE, _Q_BASE,
 _Q_STRIDE) = map(tl.constexpr, range(GATE_RECORD))  # fmt: skip
(_ITEM_POSITION, _ITEM_COUNT, _ITEM_VECTOR, _ITEM_VECTORS, _ITEM_SLOT, _ITEM_Q_BASE,
 _ITEM_Q_STRIDE, _) = map(tl.constexpr, range(RECORD))  # fmt: skip
(_RANK_START, _RANK_END, _, _OFFSET, *_) = map(tl.constexpr, range(RECORD))


@triton.jit
def gate_shrink_kernel(
    x_ptr,  # [num_rows, in_features]
    words_ptr,  # [num_slots, NUM_SLICES, WORDS] int64
    q_ptr,  # [SPLITS, query_capacity * NUM_SLICES] fp32
    table_ptr,
    x_stride,
    in_features,
    q_width,
    NUM_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_work = tl.load(table_ptr + _GATES + 2) * NUM_SLICES * SPLITS
    rows_ptr = table_ptr + tl.load(table_ptr + 1)
    query_items_ptr = table_ptr + tl.load(table_ptr + _GATES + 3)
    split_width = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLITS) * BLOCK_K
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        split = work % SPLITS
        s = (work // SPLITS) % NUM_SLICES
        query_item_ptr = query_items_ptr + (work // (SPLITS * NUM_SLICES)) * _RECORD
        live = m < tl.load(query_item_ptr + _ITEM_COUNT)
        first = tl.load(query_item_ptr + _ITEM_VECTOR)
        slot = tl.load(query_item_ptr + _ITEM_SLOT)
        position = tl.load(query_item_ptr + _ITEM_POSITION)
        rows = tl.load(rows_ptr + position + m, mask=live, other=0).to(tl.int64)
        own_ptr = words_ptr + (slot * NUM_SLICES + s) * _WORDS
        # A slice without a gate has no vectors, so nothing is read for it.
        left = tl.load(own_ptr + _D_K).to(tl.int32) - first
        held = (r < left)[:, None]
        start = split * split_width
        end = tl.where(left > 0, tl.minimum(start + split_width, in_features), start)
        x_rows = x_ptr + rows[:, None] * x_stride
        w_rows = pointer_to(tl.load(own_ptr + _QUERY), x_ptr)
        w_rows += (first + r).to(tl.int64)[:, None] * in_features
        acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for k0 in range(start, end, BLOCK_K):
            cols = k0 + tl.arange(0, BLOCK_K)[None, :]
            x = tl.load(x_rows + cols, mask=live[:, None] & (cols < end), other=0.0)
            w = tl.load(w_rows + cols, mask=held & (cols < end), other=0.0)
            acc = dot(x, tl.trans(w), acc)
        q_base = tl.load(query_item_ptr + _ITEM_Q_BASE)
        q_stride = tl.load(query_item_ptr + _ITEM_Q_STRIDE)
        q_at = (q_base + m * q_stride)[:, None].to(tl.int64) + r[None, :]
        keep = live[:, None] & (r < tl.load(query_item_ptr + _ITEM_VECTORS) - first)[None, :]
        q_split = q_ptr + split.to(tl.int64) * q_width
        tl.store(q_split + q_at * NUM_SLICES + s, acc, mask=keep)


@triton.jit
def _parts(ptr, at, stride, keep, SPLITS: tl.constexpr):
    """The sum of the parts of a shrink at some positions, added in the order of the parts."""
    total = tl.load(ptr + at, mask=keep, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(ptr + split * stride + at, mask=keep, other=0.0)
    return total


@triton.jit
def _score(
    q_ptr,  # queries of the gate's first row, in the slice
    q_stride,
    q_row_stride,
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
            q_at = (m * q_row_stride + d[None, :]) * NUM_SLICES
            keep = live[:, None] & inside[None, :]
            q = _parts(q_ptr, q_at, q_stride, keep, SPLITS)
            keys_at = keys_ptr + ranks[None, :] * d_k + d[:, None]
            keys = tl.load(keys_at, mask=held[None, :] & inside[:, None], other=0.0)
            products = dot(q, keys, products)
        v_at = (m * row_stride + ranks[None, :]) * NUM_SLICES
        v = _parts(v_ptr, v_at, v_stride, live[:, None] & held[None, :], SPLITS)
        score += tl.sum(products * v, axis=1)
    return score


@triton.jit
def fusion_gate_kernel(
    q_ptr,  # [SPLITS, query_capacity * NUM_SLICES] fp32
    v_ptr,  # [SPLITS, rank_capacity * NUM_SLICES] fp32
    words_ptr,  # [num_slots, NUM_SLICES, WORDS] int64
    gates_ptr,  # [num_rows, NUM_SLICES, max_components] fp32
    table_ptr,
    q_stride,
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
    columns = tl.arange(0, BLOCK_C)[None, :]
    for work in range(
        tl.program_id(0), tl.load(table_ptr + _GATES) * NUM_SLICES, tl.num_programs(0)
    ):
        s = work % NUM_SLICES
        gate_ptr = list_ptr + (work // NUM_SLICES) * _GATE_RECORD
        live = m < tl.load(gate_ptr + _COUNT)
        # Use 32-bit indices: the wrapper rejects sizes from 2³¹ on, and 64 bits would not fit in
        # registers.
        rows = tl.load(rows_ptr + tl.load(gate_ptr + _POSITION) + m, mask=live, other=0)
        component_ptr = components_ptr + tl.load(gate_ptr + _COMPONENT) * _RECORD
        count = tl.load(gate_ptr + _COMPONENTS)
        own_ptr = words_ptr + (tl.load(gate_ptr + _SLOT) * NUM_SLICES + s) * _WORDS
        keep = live[:, None] & (columns < count)
        scores = tl.where(keep, 0.0, float("-inf"))
        d_k = tl.load(own_ptr + _D_K).to(tl.int32)
        keys_ptr = pointer_to(tl.load(own_ptr + _KEYS), q_ptr)
        q_at = q_ptr + s + tl.load(gate_ptr + _Q_BASE) * NUM_SLICES
        first = tl.load(component_ptr + _RANK_START)
        for c in range(count):
            own = component_ptr + c * _RECORD
            rank = tl.load(own + _RANK_START)
            v_at = tl.load(gate_ptr + _V_BASE) + tl.load(own + _OFFSET)
            score = _score(
                q_at, q_stride, tl.load(gate_ptr + _Q_STRIDE), live, v_ptr + s + v_at * NUM_SLICES,
                v_stride, tl.load(gate_ptr + _V_STRIDE), keys_ptr + (rank - first) * d_k,
                tl.load(own + _RANK_END) - rank, d_k, NUM_SLICES, SPLITS, BLOCK_M, BLOCK_R, BLOCK_D,
            )  # fmt: skip
            scores = tl.where(keep & (columns == c), score[:, None], scores)
        top = tl.max(scores, axis=1)
        weights = tl.exp(scores - tl.where(live, top, 0.0)[:, None])
        # Components are added one by one, in their order.
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for c in range(count):
            total += tl.sum(tl.where(columns == c, weights, 0.0), axis=1)
        column = tl.load(gate_ptr + _COLUMN)
        at = (rows * NUM_SLICES + s)[:, None] * max_components + column + columns
        tl.store(gates_ptr + at, weights / tl.where(live, total, 1.0)[:, None], mask=keep)


def gate_shrink(x: torch.Tensor, words: torch.Tensor, table: SegmentTable) -> torch.Tensor:
    """Multiply every gated row by the queries of its adapters.

    Args:
        x: Activations, ``[num_rows, in_features]``, fp16, bf16 or fp32; rows may be strided.
        words: Words of the gates by slot, ``[num_slots, num_slices, WORDS]`` int64, contiguous; see
            the module docstring. Addresses are multiples of 16. Queries are ``[d_k, in_features]``,
            dtype of ``x``; keys are ``(Wk B)ᵀ`` of all components, ``[ranks, d_k]`` fp32.
        table: The step's segments, loaded.

    Returns:
        ``[splits, query_capacity · num_slices]`` fp32, for ``fusion_gate``, with a row's queries at
        the positions that ``tables.py`` defines and the slice innermost. The sum over the first
        axis is the query. Positions without a row are undefined.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract. Values on the device, including
            addresses, are not checked, because that would synchronise.
    """
    check_float("x", x)
    check_shape("x", x, -1, -1)
    check_rows("x", x)
    _check_words(words)
    num_slices, in_features = words.shape[1], x.shape[1]
    q = empty_parts(table.query_capacity * num_slices, in_features, x.device)
    gate_shrink_kernel[(tuning(x.device).programs,)](
        x,
        words,
        q,
        table.buffer,
        x.stride(0),
        in_features,
        q.shape[1],
        NUM_SLICES=num_slices,
        SPLITS=q.shape[0],
        **shrink_options(x.device),
    )
    return q


def fusion_gate(
    q: torch.Tensor, v: torch.Tensor, words: torch.Tensor, table: SegmentTable, num_rows: int
) -> torch.Tensor:
    """Compute the component weights of a step's gates.

    Args:
        q: Result of ``gate_shrink`` for the same table.
        v: Result of ``segmented_shrink`` for the same table.
        words: Words of the gates by slot, as for ``gate_shrink``.
        table: The step's segments. The gated members of a mix that belong to one adapter share a
            softmax; there are at most ``MAX_COMPONENTS``.
        num_rows: Rows of the step.

    Returns:
        ``[num_rows, num_slices, max_components]`` fp32, by position in the row's mix, for
        ``segmented_expand``. Undefined for members that are not gated.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    _check_words(words)
    num_slices = words.shape[1]
    check_shape("v", v, -1, table.rank_capacity * num_slices)
    check_shape("q", q, v.shape[0], table.query_capacity * num_slices)
    shape = (num_rows, num_slices, table.max_components)
    gates = torch.empty(shape, dtype=torch.float32, device=v.device)
    for name, values in {"q": q, "v": v, "gates": gates}.items():
        check_float(name, values, torch.float32)
        check_contiguous(name, values)
        if values.numel() >= 1 << 31:
            raise ValueError(f"{name} has {values.numel()} elements; 2³¹ are too many")
    tuned = tuning(v.device)
    fusion_gate_kernel[(tuned.programs,)](
        q,
        v,
        words,
        gates,
        table.buffer,
        q.shape[1],
        v.shape[1],
        table.max_components,
        NUM_SLICES=num_slices,
        SPLITS=v.shape[0],
        BLOCK_M=TILE_ROWS,
        BLOCK_C=MAX_COMPONENTS,
        BLOCK_R=RANK_TILE,
        BLOCK_D=16,
        num_warps=4,
        num_stages=1,
        **tuned.registers(255),
        enable_fp_fusion=True,
    )
    return gates


def _check_words(values: torch.Tensor) -> None:
    check_shape("words", values, -1, -1, WORDS)
    check_contiguous("words", values)
    if values.dtype != torch.int64:
        raise ValueError(f"words is {values.dtype}; torch.int64 is needed")
