"""Triton form of ``paged_attention_reference``: decode and chunked prefill over KV blocks.

Query heads that share a KV head, and neighbouring tokens of a chunk, are rows of one tile: keys and
values are read once for all of them. An *item* is the tokens of such a tile; a *split* is a fixed
range of a sequence's positions; a *record* is an item with the splits that one program computes.
An item is *spread* if each of its splits has a record of its own (see ``AttentionTable``).

Within a split, the softmax is updated tile by tile. The results of an item's splits are merged in
order, either by the only program of the item or by the one that finishes last. If heads have sinks,
the merged sums begin with these.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.common import (
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
    dot,
    is_last,
    tuning,
)
from turret.kernels.gpu.tables import ATTENTION_RECORD, AttentionTable

# Keys per tile, by query rows of a tile; more do not fit in registers.
_TILES = {16: 64, 32: 32}
MAX_BLOCK = 32
# Without this option, NVIDIA's assembler would spill two registers rather than use more than 168.
_LIMITS = {True: {"maxnreg": 255}, False: {}}
_RECORD = tl.constexpr(ATTENTION_RECORD)
_MASKED = tl.constexpr(-1e30)


@triton.jit
def _merge(best, total, acc, other_best, other_total, other_acc):
    """Add a later split's softmax state to the running one.

    The explicit ``fma`` makes every kernel round in the same way.
    """
    top = tl.maximum(best, other_best)
    mine = tl.exp2(best - top)
    theirs = tl.exp2(other_best - top)
    total = tl.fma(total, mine, other_total * theirs)
    mine = tl.broadcast_to(mine[:, None], acc.shape)
    acc = tl.fma(acc, mine, other_acc * theirs[:, None])
    return top, total, acc


@triton.jit
def _begin(sinks_ptr, head, live, PER_HEAD: tl.constexpr, BLOCK_M: tl.constexpr):
    """The softmax state without keys, ``best [M]`` and ``total [M]``; a sink counts as a score."""
    best = tl.full((BLOCK_M,), _MASKED, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if sinks_ptr is not None:
        m = tl.arange(0, BLOCK_M)
        sink = tl.load(sinks_ptr + head * PER_HEAD + m % PER_HEAD, mask=live, other=0.0)
        best = sink * 1.4426950408889634
        total = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    return best, total


@triton.jit
def _merge_records(
    state_ptr, acc_ptr, sinks_ptr, first, count, head, live, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The softmax state of a spread item, merged from its records in order."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    keep = live[:, None] & (d < HEAD_DIM)[None, :]
    best, total = _begin(sinks_ptr, head, live, PER_HEAD, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for record in tl.range(first, first + count, num_stages=1):
        at = (record * KV_HEADS + head).to(tl.int64) * BLOCK_M + m
        other_best = tl.load(state_ptr + at * 2, mask=live, other=_MASKED, cache_modifier=".cg")
        other_total = tl.load(state_ptr + at * 2 + 1, mask=live, other=0.0, cache_modifier=".cg")
        at_acc = acc_ptr + at[:, None] * HEAD_DIM + d[None, :]
        other_acc = tl.load(at_acc, mask=keep, other=0.0, cache_modifier=".cg")
        best, total, acc = _merge(best, total, acc, other_best, other_total, other_acc)
    return total, acc


@triton.jit
def _attend_split(
    q,  # [BLOCK_M, BLOCK_D], not scaled yet: rounding it again would double its error
    k_ptr,  # [num_blocks, block_size, kv_heads, head_dim], from this head on
    v_ptr,
    blocks_ptr,  # block numbers of the sequence
    positions,  # [BLOCK_M], positions of the queries
    first,  # first visible position of the sequence
    last,  # last position that any row sees
    start,  # start of the split
    row_elements: tl.constexpr,  # KV_HEADS * HEAD_DIM
    scale,  # multiplied by log2(e), and by 2 / SOFTCAP if there is a cap
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The softmax state of one split: ``best [M]``, ``total [M]``, ``acc [M, D]``, fp32."""
    d = tl.arange(0, BLOCK_D)
    best = tl.full((BLOCK_M,), _MASKED, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for t in range(start, tl.minimum(start + SPLIT, last + 1), TILE):
        keys = t + tl.arange(0, TILE)
        # Blocks are not cleared when they change owner, so unwritten positions must not be read.
        exists = (keys >= first) & (keys <= last)
        block = tl.load(blocks_ptr + keys // BLOCK_SIZE, mask=exists, other=0)
        if WIDE:
            block = block.to(tl.int64)
        at = (block * BLOCK_SIZE + keys % BLOCK_SIZE) * row_elements
        keep = exists[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + at[:, None] + d[None, :], mask=keep, other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, TILE), dtype=tl.float32))
        visible = (keys[None, :] <= positions[:, None]) & exists[None, :]
        if WINDOW > 0:
            visible = visible & (keys[None, :] > positions[:, None] - WINDOW)
        scores = scores * scale
        if SOFTCAP > 0:
            # c tanh(s / c) = c - 2 c / (e^(2 s / c) + 1), times log2(e) as all scores here.
            capped = 1.4426950408889634 * SOFTCAP
            scores = capped - 2 * capped / (tl.exp2(scores) + 1.0)
        scores = tl.where(visible, scores, _MASKED)
        top = tl.maximum(best, tl.max(scores, axis=1))
        # A row that sees no key of the tile must add nothing.
        weights = tl.where(visible, tl.exp2(scores - top[:, None]), 0.0)
        shrink = tl.exp2(best - top)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + at[:, None] + d[None, :], mask=keep, other=0.0)
        acc = dot(weights.to(v.dtype), v, acc * shrink[:, None])
        best = top
    return best, total, acc


@triton.jit
def _finish(
    out_ptr, state_ptr, acc_ptr, counters_ptr, sinks_ptr, record_ptr, record, head, best, total,
    acc, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store a whole item's result, or a spread item's state; the last program merges the states."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    # Load the number of rows again, to free its register during the loop over keys.
    live = m // PER_HEAD < tl.load(record_ptr + 1, volatile=True)
    keep = live[:, None] & (d < HEAD_DIM)[None, :]
    count = tl.load(record_ptr + 8)
    done = count == 1
    if count > 1:
        at = (record * KV_HEADS + head).to(tl.int64) * BLOCK_M + m
        tl.store(state_ptr + at * 2, best, mask=live)
        tl.store(state_ptr + at * 2 + 1, total, mask=live)
        tl.store(acc_ptr + at[:, None] * HEAD_DIM + d[None, :], acc, mask=keep)
        first = tl.load(record_ptr + 7)
        done = is_last(counters_ptr + first * KV_HEADS + head, count)
        if done:
            total, acc = _merge_records(
                state_ptr, acc_ptr, sinks_ptr, first, count, head, live, KV_HEADS, HEAD_DIM,
                PER_HEAD, BLOCK_M, BLOCK_D,
            )  # fmt: skip
    if done:
        result = acc / tl.where(live, total, 1.0)[:, None]
        row = (tl.load(record_ptr, volatile=True) + m // PER_HEAD).to(tl.int64)
        out_head = row * (KV_HEADS * PER_HEAD) + head * PER_HEAD + m % PER_HEAD
        out_at = out_ptr + (out_head * HEAD_DIM)[:, None] + d[None, :]
        tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def paged_attention_kernel(
    q_ptr,  # [num_rows, num_heads, head_dim]
    k_ptr,  # [num_blocks, block_size, kv_heads, head_dim]
    v_ptr,
    out_ptr,  # [num_rows, num_heads, head_dim]
    state_ptr,  # [spread_records, kv_heads, BLOCK_M, 2] fp32
    acc_ptr,  # [spread_records, kv_heads, BLOCK_M, head_dim] fp32
    counters_ptr,  # [spread_records, kv_heads] int32
    sinks_ptr,  # [num_heads] fp32 or None
    table_ptr,
    blocks_ptr,  # block numbers of all sequences
    scale,  # see _attend_split
    q_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_work = tl.load(table_ptr) * KV_HEADS
    records_ptr = table_ptr + tl.load(table_ptr + 1)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        head = work % KV_HEADS
        record = work // KV_HEADS
        record_ptr = records_ptr + record * _RECORD
        tokens = tl.load(record_ptr + 1)
        token = m // PER_HEAD
        live = token < tokens
        first_position = tl.load(record_ptr + 2)
        positions = first_position + tl.minimum(token, tokens - 1)
        row = (tl.load(record_ptr) + token).to(tl.int64)
        q_head = head * PER_HEAD + m % PER_HEAD
        q_at = (row * q_stride + q_head * HEAD_DIM)[:, None] + d[None, :]
        keep = live[:, None] & (d < HEAD_DIM)[None, :]
        q = tl.load(q_ptr + q_at, mask=keep, other=0.0).to(k_ptr.dtype.element_ty)
        best = tl.full((BLOCK_M,), _MASKED, dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        if sinks_ptr is not None:  # noqa: SIM102 - the first condition is a compile-time constant
            # A spread item adds its sinks at its end, because each of its records has a state of
            # its own.
            if tl.load(record_ptr + 8) == 1:
                best, total = _begin(sinks_ptr, head, live, PER_HEAD, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        for split in range(tl.load(record_ptr + 5), tl.load(record_ptr + 6)):
            split_best, split_total, split_acc = _attend_split(
                q, k_ptr + head * HEAD_DIM, v_ptr + head * HEAD_DIM,
                blocks_ptr + tl.load(record_ptr + 3), positions, tl.load(record_ptr + 4),
                first_position + tokens - 1, split * SPLIT, KV_HEADS * HEAD_DIM, scale,
                HEAD_DIM, BLOCK_SIZE, WIDE, WINDOW, SOFTCAP, SPLIT, TILE, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            best, total, acc = _merge(best, total, acc, split_best, split_total, split_acc)
        _finish(
            out_ptr, state_ptr, acc_ptr, counters_ptr, sinks_ptr, record_ptr, record, head, best,
            total, acc, KV_HEADS, HEAD_DIM, PER_HEAD, BLOCK_M, BLOCK_D,
        )  # fmt: skip


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: AttentionTable,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the attention of a step's new tokens to their sequences.

    Args:
        q: Rotated queries, ``[num_rows, num_heads, head_dim]``, fp16, bf16 or fp32; rows may be
            strided, heads not.
        k_cache: Rotated keys of one layer, ``[num_blocks, block_size, kv_heads, head_dim]``,
            contiguous; the new tokens' keys are already written. ``block_size`` divides 32.
        v_cache: Values, same shape and dtype.
        table: The step's sequences, loaded.
        scale: Multiplied into the scores, usually ``head_dim ** -0.5``.
        softcap: Scores become ``softcap · tanh(score / softcap)`` if it is given.
        sinks: An additional score per head in the softmax, ``[num_heads]`` fp32 contiguous, or
            None.

    Returns:
        ``[num_rows, num_heads, head_dim]``, dtype of the cache. Rows without a sequence are
        undefined.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    per_head = table.queries_per_head
    _check(q, k_cache, v_cache, table, sinks)
    tile, block_d = _tile(table, head_dim)
    tuned = tuning(q.device)
    lead = (max(1, table.spread_records), kv_heads, table.tile_rows)
    state = torch.empty(*lead, 2, dtype=torch.float32, device=q.device)
    acc = torch.empty(*lead, head_dim, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=k_cache.dtype, device=q.device)
    paged_attention_kernel[(tuned.programs,)](
        q,
        k_cache,
        v_cache,
        out,
        state,
        acc,
        table.counters,
        sinks,
        table.buffer,
        table.blocks,
        scale * 1.4426950408889634 * (1.0 if softcap is None else 2.0 / softcap),
        q.stride(0),
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PER_HEAD=per_head,
        BLOCK_SIZE=block_size,
        WIDE=k_cache.numel() >= 1 << 31,
        WINDOW=table.window or 0,
        SOFTCAP=softcap or 0,
        SPLIT=table.split,
        TILE=tile,
        BLOCK_M=table.tile_rows,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=tuned.attention_stages,
        **_LIMITS[tuned.inline_ptx],
        enable_fp_fusion=True,
    )
    return out


def _tile(table: AttentionTable, head_dim: int) -> tuple[int, int]:
    """The numbers of keys and features in a tile."""
    block_d = 1 << (max(16, head_dim) - 1).bit_length()  # the next power of two
    # A head twice as wide leaves room for half as many keys.
    tile = _TILES[table.tile_rows] // max(1, block_d // 128)
    if table.split % tile:
        raise ValueError(f"a split of the table is {table.split}; a multiple of {tile} is needed")
    return tile, block_d


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: AttentionTable,
    sinks: torch.Tensor | None,
) -> None:
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    check_float("q", q)
    check_shape("q", q, -1, kv_heads * table.queries_per_head, head_dim)
    if kv_heads != table.kv_heads:
        raise ValueError(f"k_cache has {kv_heads} heads; the table was made for {table.kv_heads}")
    check_rows("q", q)
    if q.stride(1) != head_dim:
        raise ValueError(f"the heads of q are {q.stride(1)} apart; {head_dim} is needed")
    check_float("k_cache", k_cache)
    check_float("v_cache", v_cache, k_cache.dtype)
    check_shape("v_cache", v_cache, *k_cache.shape)
    check_contiguous("k_cache", k_cache)
    check_contiguous("v_cache", v_cache)
    if sinks is not None:
        check_float("sinks", sinks, torch.float32)
        check_shape("sinks", sinks, q.shape[1])
        check_contiguous("sinks", sinks)
    if MAX_BLOCK % block_size:
        raise ValueError(f"block_size is {block_size}; a divisor of {MAX_BLOCK} is needed")
