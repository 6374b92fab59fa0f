"""Causal attention of new tokens over a paged KV cache (decode and chunked prefill alike).

Online softmax (FlashAttention, arXiv 2205.14135, section 3.1) over tiles of ``TILE`` positions::

    m ← max(m, max_t s_t)        l ← l·α + Σ_t e^(s_t − m)        o ← o·α + Σ_t e^(s_t − m) v_t

The sums are fp32, and tiles begin at fixed positions: 0, TILE, 2·TILE, … A row's result therefore
depends only on its own query and keys, not on the batch or on the chunks of a prompt. Grouped query
heads are additional query rows, so keys and values are never repeated. A head may have a *sink*
(arXiv 2309.17453; those of gpt-oss are learned): a score without a position, with which m and l
begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turret.kernels.rows import prepare_products, row_exp_, row_softcap_, table_product

TILE = 128
# Query rows are padded to a multiple of this, the smallest number of rows in one product.
_ROW_MULTIPLE = 4
# The value is finite, so that a row with a fully masked tile (sliding window) needs no special
# case: the next tile's rescaling by e^(MASKED − m) = 0 erases the terms of such a tile.
_MASKED = -1e30
# Columns of ones next to the values, so that the same product computes the softmax denominator.
_ONES = 4


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence's part of a step.

    Attributes:
        row_start: First row of its new tokens.
        num_new: New tokens (1 in decode).
        num_context: Tokens already in the cache before them.
        blocks: Block numbers of the sequence, in position order, for context and new tokens.
        num_padding: Leading cache slots that are empty and never seen.
    """

    row_start: int
    num_new: int
    num_context: int
    blocks: Sequence[int]
    num_padding: int = 0


@dataclass(frozen=True, slots=True)
class _Tile:
    num_sequences: int
    blocks: torch.Tensor  # [num_sequences * blocks_per_tile] int64
    mask: torch.Tensor | None  # [num_sequences, 1, query_rows, TILE] fp32, added to the scores


@dataclass(frozen=True, slots=True)
class _SameLength:
    """Sequences with equally many new tokens, longest first: a tile covers the first of them."""

    rows: torch.Tensor  # [num_sequences * num_new] int64
    num_sequences: int
    num_new: int
    tiles: tuple[_Tile, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Attention metadata of a step, shared by all layers with the same window."""

    groups: tuple[_SameLength, ...]
    num_rows: int


def plan_attention(
    spans: Sequence[SequenceSpan],
    *,
    num_rows: int,
    block_size: int,
    queries_per_head: int,
    window: int | None,
    device: torch.device,
) -> AttentionPlan:
    """Prepare a step's attention.

    Args:
        spans: The sequences of the step, in any order.
        num_rows: The number of rows of the step; rows without a span get zeros.
        block_size: Positions per KV block; divides ``TILE``. Block 0 is never read unmasked.
        queries_per_head: Query heads per KV head.
        window: Sliding window in tokens (a query sees the last ``window`` positions, itself
            included), or None.
        device: The device of the metadata.
    """
    by_length: dict[int, list[SequenceSpan]] = {}
    for span in spans:
        by_length.setdefault(span.num_new, []).append(span)
    groups = tuple(
        _plan_group(members, num_new, block_size, queries_per_head, window, device)
        for num_new, members in by_length.items()
    )
    return AttentionPlan(groups, num_rows)


def _plan_group(
    members: list[SequenceSpan],
    num_new: int,
    block_size: int,
    queries_per_head: int,
    window: int | None,
    device: torch.device,
) -> _SameLength:
    members = sorted(members, key=lambda span: -(span.num_context + num_new))
    per_tile = TILE // block_size
    lengths = [span.num_context + num_new for span in members]
    counts = [-(-length // TILE) for length in lengths]
    query_rows = _padded(num_new * queries_per_head)
    tiles = []
    for t in range(counts[0]):
        active = sum(count > t for count in counts)
        blocks = torch.zeros(active, per_tile, dtype=torch.int64)
        for i, span in enumerate(members[:active]):
            part = span.blocks[t * per_tile : (t + 1) * per_tile]
            blocks[i, : len(part)] = torch.tensor(part, dtype=torch.int64)
        mask = _tile_mask(members[:active], t, num_new, queries_per_head, query_rows, window)
        tiles.append(
            _Tile(active, blocks.view(-1).to(device), None if mask is None else mask.to(device))
        )
    starts = torch.tensor([span.row_start for span in members])
    rows = (starts[:, None] + torch.arange(num_new)).view(-1).to(device)
    return _SameLength(rows, len(members), num_new, tuple(tiles))


def _tile_mask(
    members: list[SequenceSpan],
    t: int,
    num_new: int,
    queries_per_head: int,
    query_rows: int,
    window: int | None,
) -> torch.Tensor | None:
    first = torch.tensor([span.num_context for span in members])
    padding = torch.tensor([span.num_padding for span in members])
    shortest = int(first.min())
    longest = int(first.max()) + num_new - 1
    sees_all = (t + 1) * TILE <= shortest + 1
    in_window = window is None or t * TILE > longest - window
    if sees_all and in_window and t * TILE >= int(padding.max()):
        return None
    keys = torch.arange(t * TILE, (t + 1) * TILE)
    queries = first[:, None] + torch.arange(num_new)
    visible = (keys <= queries[..., None]) & (keys >= padding[:, None, None])
    if window is not None:
        visible &= keys > queries[..., None] - window
    mask = torch.zeros(len(members), query_rows, TILE)
    dense = torch.zeros(visible.shape).masked_fill_(~visible, _MASKED)
    mask[:, : num_new * queries_per_head] = dense.repeat_interleave(queries_per_head, dim=1)
    return mask.unsqueeze(1)


def _padded(rows: int) -> int:
    return -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE


def prepare_attention(head_dim: int, device: torch.device) -> None:
    """Run the trials of attention's products now, not during a request, if trials are needed."""
    prepare_products(head_dim, TILE, device)
    prepare_products(TILE, head_dim + _ONES, device)


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend by torch products: the torch path, and the Triton kernel's oracle.

    Args:
        q: Rotated queries, ``[num_rows, num_heads, head_dim]``, any float dtype.
        k_cache: Rotated keys of one layer, ``[num_blocks, block_size, num_kv_heads, head_dim]``.
            The new tokens' keys are already written.
        v_cache: Values, same shape.
        plan: Made by ``plan_attention`` with this cache's block size.
        scale: Multiplied into the queries, usually ``head_dim ** -0.5``.
        softcap: Scores become ``softcap · tanh(score / softcap)`` if it is given.
        sinks: An additional score per head in the softmax, ``[num_heads]`` fp32, or None.

    Returns:
        ``[num_rows, num_heads, head_dim]``, dtype of the cache.
    """
    num_rows, num_heads, head_dim = q.shape
    out = torch.zeros(num_rows, num_heads, head_dim, dtype=k_cache.dtype, device=q.device)
    caches = k_cache, v_cache
    for group in plan.groups:
        rows = q.index_select(0, group.rows)
        out.index_copy_(0, group.rows, _attend(rows, caches, group, scale, softcap, sinks))
    return out


def _attend(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    group: _SameLength,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    k_cache, v_cache = caches
    n, m = group.num_sequences, group.num_new
    num_heads, head_dim = q.shape[1:]
    kv_heads = k_cache.shape[2]
    per_head = num_heads // kv_heads
    query_rows = _padded(m * per_head)
    # [n, kv_heads, query_rows, head_dim]: a KV head's query heads and new tokens are its rows.
    queries = torch.zeros(n, kv_heads, query_rows, head_dim, device=q.device)
    view = q.view(n, m, kv_heads, per_head, head_dim).transpose(1, 2)
    real = queries[:, :, : m * per_head].view(n, kv_heads, m, per_head, head_dim)
    torch.mul(view, scale, out=real)
    queries = queries.view(n * kv_heads, query_rows, head_dim)

    acc = torch.empty(0)
    best = torch.empty(0)
    for t, tile in enumerate(group.tiles):
        size = tile.num_sequences * kv_heads
        keys, values = _gather(k_cache, v_cache, tile, head_dim)
        scores = table_product(queries[:size], keys)
        if softcap is not None:
            row_softcap_(scores, softcap)
        if tile.mask is not None:
            scores.view(tile.num_sequences, kv_heads, query_rows, TILE).add_(tile.mask)
        top = scores.amax(-1, keepdim=True)
        if t == 0:
            sink = None if sinks is None else _sinks_of_rows(sinks, group, kv_heads, query_rows)
            best = top if sink is None else torch.maximum(top, sink)
            acc = table_product(row_exp_(scores.sub_(best)), values)
            if sink is not None:
                acc[..., head_dim:] += row_exp_(sink - best)
            continue
        top = torch.maximum(top, best[:size])
        acc[:size].mul_(row_exp_(best[:size].sub_(top)))
        best[:size] = top
        acc[:size] += table_product(row_exp_(scores.sub_(top)), values)
    result = acc[..., :head_dim] / acc[..., head_dim : head_dim + 1]
    result = result.view(n, kv_heads, query_rows, head_dim)[:, :, : m * per_head]
    result = result.reshape(n, kv_heads, m, per_head, head_dim).transpose(1, 2)
    return result.reshape(n * m, num_heads, head_dim).to(k_cache.dtype)


def _sinks_of_rows(
    sinks: torch.Tensor, group: _SameLength, kv_heads: int, query_rows: int
) -> torch.Tensor:
    """The sink of every query row, ``[num_sequences · kv_heads, query_rows, 1]``."""
    of_rows = sinks.view(kv_heads, -1).repeat(1, group.num_new)
    missing = query_rows - of_rows.shape[1]
    of_rows = torch.cat((of_rows, of_rows.new_zeros(kv_heads, missing)), dim=1)
    return of_rows.repeat(group.num_sequences, 1).unsqueeze(-1)


def _gather(
    k_cache: torch.Tensor, v_cache: torch.Tensor, tile: _Tile, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``[n·kv_heads, head_dim, TILE]``, and values followed by columns of ones, both fp32."""
    kv_heads = k_cache.shape[2]
    n = tile.num_sequences
    shape = (n, TILE, kv_heads, head_dim)
    keys = torch.empty(n, kv_heads, head_dim, TILE, device=k_cache.device)
    keys.copy_(k_cache.index_select(0, tile.blocks).view(shape).permute(0, 2, 3, 1))
    values = torch.empty(n, kv_heads, TILE, head_dim + _ONES, device=k_cache.device)
    values[..., :head_dim] = v_cache.index_select(0, tile.blocks).view(shape).transpose(1, 2)
    values[..., head_dim:] = 1.0
    return keys.view(n * kv_heads, -1, TILE), values.view(n * kv_heads, TILE, -1)
