"""Draws a token from every row of logits: greedy, or by temperature, top-k, top-p and min-p.

Each program processes one row, so a row's token depends only on the row. Nothing is sorted: top-k
and top-p keep all tokens up to some distance from the likeliest, and bisection over the bits of
this distance finds it exactly, in about 17 passes over a row. Of the tokens at exactly this
distance, those with the lowest ids are kept.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.common import check_rows, check_shape, tuning
from turret.kernels.gpu.tables import ROW

_ROW = tl.constexpr(ROW)
_INFINITY_BITS = tl.constexpr(0x7F800000)
# The bits of 104.0: e^-104 is 0 in fp32, so tokens farther away have no mass.
_FARTHEST_BITS = tl.constexpr(0x42D00000)
_MANY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _distances(row_ptr, at, vocab, top, temperature):
    """Distances of scaled logits from the largest, as the bits of fp32 numbers ≥ 0.

    The bits of such numbers have the same order as the numbers. NaN and positions past the
    vocabulary are infinitely far away.
    """
    x = tl.load(row_ptr + at, mask=at < vocab, other=float("-inf"))
    distance = (top - x) / temperature
    distance = tl.where(distance >= 0.0, distance, float("inf"))
    return distance, distance.to(tl.int32, bitcast=True)


@triton.jit
def _tokens_within(row_ptr, vocab, top, temperature, limit, BLOCK: tl.constexpr):
    """The tokens up to the distance ``limit``, as their count, mass and borders.

    Returns:
        The count; the mass (1 for the likeliest token); the largest distance among them; the
        smallest distance beyond them.
    """
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    mass = tl.zeros((BLOCK,), dtype=tl.float32)
    last = tl.zeros((BLOCK,), dtype=tl.int32)
    beyond = tl.full((BLOCK,), _INFINITY_BITS, dtype=tl.int32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        distance, bits = _distances(row_ptr, at, vocab, top, temperature)
        inside = bits <= limit
        count += inside.to(tl.int32)
        mass += tl.where(inside, tl.exp(-distance), 0.0)
        last = tl.maximum(last, tl.where(inside, bits, 0))
        beyond = tl.minimum(beyond, tl.where(inside, _INFINITY_BITS, bits))
    return tl.sum(count, 0), tl.sum(mass, 0), tl.max(last, 0), tl.min(beyond, 0)


@triton.jit
def _keep_likeliest(row_ptr, vocab, top, temperature, top_k, BLOCK: tl.constexpr):
    """The distance of the ``top_k``-th likeliest token, and how many tokens at it are kept."""
    low = tl.full((), 0, dtype=tl.int32)
    high = tl.full((), _FARTHEST_BITS, dtype=tl.int32)
    while low < high:
        middle = low + (high - low) // 2
        count, _, last, beyond = _tokens_within(row_ptr, vocab, top, temperature, middle, BLOCK)
        # The result is the distance of some token, so jump to the nearest token's on either side.
        if count >= top_k:
            high = last
        else:
            low = beyond
    nearer, _, _, _ = _tokens_within(row_ptr, vocab, top, temperature, low - 1, BLOCK)
    return low, top_k - nearer


@triton.jit
def _keep_mass(row_ptr, vocab, top, temperature, top_p, limit, ties, BLOCK: tl.constexpr):
    """The same as ``_keep_likeliest``, for top-p.

    Of the tokens that top-k keeps (up to ``limit``, and ``ties`` at it), the likeliest are kept:
    the fewest whose mass is at least ``top_p`` of the mass of all.
    """
    _, nearer, _, _ = _tokens_within(row_ptr, vocab, top, temperature, limit - 1, BLOCK)
    count, mass, _, _ = _tokens_within(row_ptr, vocab, top, temperature, limit, BLOCK)
    weight = tl.exp(-limit.to(tl.float32, bitcast=True))
    # If ties were cut, count only the mass of the kept ones.
    mass = tl.where(ties < count, tl.minimum(mass, nearer + ties.to(tl.float32) * weight), mass)
    wanted = top_p * mass
    low = tl.full((), 0, dtype=tl.int32)
    high = tl.minimum(limit, _FARTHEST_BITS)
    while low < high:
        middle = low + (high - low) // 2
        _, found, last, beyond = _tokens_within(row_ptr, vocab, top, temperature, middle, BLOCK)
        if found >= wanted:
            high = last
        else:
            low = beyond
    _, nearer, _, _ = _tokens_within(row_ptr, vocab, top, temperature, low - 1, BLOCK)
    weight = tl.exp(-low.to(tl.float32, bitcast=True))
    needed = tl.maximum(tl.ceil((wanted - nearer) / weight), 1.0)
    # Limit the number to far more than the vocabulary, so that it fits an int.
    needed = tl.minimum(needed, 1e9).to(tl.int32)
    return low, tl.where(low == limit, tl.minimum(needed, ties), needed)


@triton.jit
def _kept(row_ptr, at, vocab, top, temperature, limit, ties, seen):
    """The mass of each kept token of a block, 0 for others, and the ties up to the block's end."""
    distance, bits = _distances(row_ptr, at, vocab, top, temperature)
    is_tie = (bits == limit).to(tl.int32)
    inside = (bits < limit) | ((is_tie > 0) & (seen + tl.cumsum(is_tie, 0) <= ties))
    return tl.where(inside, tl.exp(-distance), 0.0), seen + tl.sum(is_tie, 0)


@triton.jit
def _draw(row_ptr, vocab, top, temperature, limit, ties, uniform, winner, BLOCK: tl.constexpr):
    """The first kept token, by id, at which the running mass passes ``uniform`` · total mass."""
    total = tl.full((), 0.0, dtype=tl.float32)
    seen = tl.full((), 0, dtype=tl.int32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mass, seen = _kept(row_ptr, at, vocab, top, temperature, limit, ties, seen)
        total += tl.sum(mass, 0)
    wanted = uniform * total
    running = tl.full((), 0.0, dtype=tl.float32)
    seen = tl.full((), 0, dtype=tl.int32)
    is_open = tl.full((), 1, dtype=tl.int32)
    # Rounding may leave the total below the wanted mass. If so, take the last token with mass.
    token = winner
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mass, seen = _kept(row_ptr, at, vocab, top, temperature, limit, ties, seen)
        whole = tl.sum(mass, 0)
        if (is_open > 0) & (whole > 0.0):
            passes = (running + tl.cumsum(mass, 0) > wanted) & (mass > 0.0)
            first = tl.min(tl.where(passes, at, _MANY), 0)
            last = tl.max(tl.where(mass > 0.0, at, 0), 0)
            token = tl.where(first < _MANY, first, last)
            if running + whole > wanted:
                is_open = tl.full((), 0, dtype=tl.int32)
        running += whole
    return token


@triton.jit
def sample_rows_kernel(
    logits_ptr,  # [num_rows, vocab] fp32
    table_ptr,  # [>= num_rows, 8] fp32
    tokens_ptr,  # [>= num_rows] int64
    stride,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    draw_ptr = table_ptr + row * _ROW
    temperature = tl.load(draw_ptr + 1)
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    best_at = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + at, mask=at < vocab, other=float("-inf"))
        is_better = x > best
        best = tl.where(is_better, x, best)
        best_at = tl.where(is_better, at, best_at)
    top = tl.max(best, 0)
    winner = tl.min(tl.where(best == top, best_at, _MANY), 0)
    token = winner
    if (temperature > 0.0) & (top > float("-inf")):
        limit = tl.full((), _INFINITY_BITS, dtype=tl.int32)
        ties = tl.full((), _MANY, dtype=tl.int32)
        top_k = tl.load(draw_ptr + 4).to(tl.int32)
        if (top_k > 0) & (top_k < vocab):
            limit, ties = _keep_likeliest(row_ptr, vocab, top, temperature, top_k, BLOCK)
        top_p = tl.load(draw_ptr + 2)
        if top_p < 1.0:
            limit, ties = _keep_mass(row_ptr, vocab, top, temperature, top_p, limit, ties, BLOCK)
        farthest = tl.load(draw_ptr + 3).to(tl.int32, bitcast=True)
        if farthest < limit:
            limit = farthest
            ties = tl.full((), _MANY, dtype=tl.int32)
        token = _draw(
            row_ptr, vocab, top, temperature, limit, ties, tl.load(draw_ptr), winner, BLOCK
        )
    tl.store(tokens_ptr + row, token.to(tl.int64))


def sample_rows(logits: torch.Tensor, table: torch.Tensor, tokens: torch.Tensor) -> None:
    """Draw a token of every row.

    ``z`` is a row's logits divided by its temperature, and ``softmax(z)`` a token's mass. Top-k
    keeps the ``k`` likeliest tokens. Of these, top-p keeps the fewest likeliest whose mass is at
    least ``top_p`` of the mass of all, and min-p those up to a given distance in ``z`` from the
    likeliest. The token is the first, by id, at which the running mass of the kept tokens passes
    ``uniform`` times their whole mass. At temperature 0, and if all logits are -inf, the likeliest
    token is drawn; the first one wins a tie.

    Args:
        logits: ``[num_rows, vocab]`` fp32; rows may be strided.
        table: ``SamplingTable.buffer``, ``[at least num_rows, ROW]`` fp32.
        tokens: ``[at least num_rows]`` int64; the first ``num_rows`` are written.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    num_rows, vocab = logits.shape
    if logits.dtype != torch.float32:
        raise ValueError(f"logits is {logits.dtype}; fp32 is needed")
    check_rows("logits", logits)
    check_shape("table", table, -1, ROW)
    if table.dtype != torch.float32 or not table.is_contiguous():
        raise ValueError("table must be contiguous fp32")
    if tokens.dtype != torch.int64 or tokens.dim() != 1:
        raise ValueError("tokens must be one row of int64")
    if min(len(table), len(tokens)) < num_rows:
        raise ValueError(f"{num_rows} rows are drawn; {len(table)}, {len(tokens)} are allocated")
    if num_rows == 0:
        return
    sample_rows_kernel[(num_rows,)](
        logits,
        table,
        tokens,
        logits.stride(0),
        vocab,
        BLOCK=tuning(logits.device).sample_block,
        num_warps=16,
        enable_fp_fusion=True,
    )
