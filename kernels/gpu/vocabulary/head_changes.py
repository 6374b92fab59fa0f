"""Triton form of ``change_logits``: what adapters change of the head's logits, in place in fp32.

All but low-rank updates, which ``head_low_rank.py`` adds.

A program takes 64 rows of the step and 32 tokens, and goes through the positions of the rows' mixes
and, at each, through the adapters one after another: a tile of many rows reads each adapter's
matrices once, as ``dense`` does. The program alone writes its tokens' logits, so the members of a
row are added in their order. A row's sums are those of its own row of the tile.

Which of an adapter's rows belong to the tile's tokens is looked up among its ids, so that a
step launches the same for three other tokens as for a whole other matrix.

The reference is ``server/adapters/device/vocabulary.py``, which is also the other paths' way.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.shared.addresses import pointer_to
from turret.kernels.gpu.shared.contract import (
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
)
from turret.kernels.gpu.shared.dots import dot
from turret.kernels.gpu.shared.tuning import tuning, wgmma_stages
from turret.kernels.gpu.tables.member_table import HEADER, MemberTable
from turret.kernels.gpu.vocabulary.vocabulary_words import (
    HEAD_ROWS,
    HEAD_VECTORS,
    WORDS,
    check_words,
    place_of,
)

_HEADER, _WORDS = tl.constexpr(HEADER), tl.constexpr(WORDS)
_ROWS, _VECTORS = tl.constexpr(HEAD_ROWS), tl.constexpr(HEAD_VECTORS)
_NONE = tl.constexpr(2**31 - 1)
# Of the widest instruction there is: the order of a row's sum may not depend on how many there are.
_BLOCK_M, _BLOCK_N, _BLOCK_K = 64, 32, 64


@triton.jit
def _row_products(x_at, d_at, mine, has, hidden, BLOCK_K: tl.constexpr):
    """``x`` of some rows times another matrix's rows of some tokens."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((x_at.shape[0], d_at.shape[0]), dtype=tl.float32)
    for start in range(0, hidden, BLOCK_K):
        keep = start + k < hidden
        x = tl.load(x_at + (start + k)[None, :], mask=mine[:, None] & keep[None, :], other=0.0)
        d = tl.load(d_at + (start + k)[None, :], mask=has[:, None] & keep[None, :], other=0.0)
        acc = dot(x, tl.trans(d), acc)
    return acc


@triton.jit
def _looked_up(word, words_ptr, n, is_token):
    """Which of an adapter's rows those of some tokens are, and whether it has any of them."""
    place = n
    has = is_token
    ids = tl.load(word + _ROWS)
    if ids != 0:
        ids_ptr = pointer_to(ids, words_ptr)
        place = place_of(ids_ptr, tl.load(word + _ROWS + 2), n)
        has = tl.load(ids_ptr + place) == n
    return place, has


@triton.jit
def _vector(word, n, is_token, neutral: tl.constexpr):
    """How far an adapter's fp32 vector is from ``neutral``, for some tokens; 0 if it has none."""
    change = tl.zeros(n.shape, dtype=tl.float32)
    address = tl.load(word)
    if address != 0:
        at = address.to(tl.pointer_type(tl.float32)) + n
        change = tl.load(at, mask=is_token, other=neutral) - neutral
    return change


@triton.jit
def head_changes_kernel(
    x_ptr,  # [num_rows, hidden]
    base_ptr,  # [num_rows, vocab]
    moved_ptr,  # [num_rows, vocab]
    logits_ptr,  # [num_rows, vocab] fp32
    words_ptr,  # [num_slots, WORDS] int64
    table_ptr,
    hidden,
    vocab,
    base_stride,
    moved_stride,
    HAS_MOVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    positions = tl.load(table_ptr)
    num_rows = tl.load(table_ptr + 1)
    blocks = tl.cdiv(vocab, BLOCK_N)
    num_work = tl.cdiv(num_rows, BLOCK_M) * blocks
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        row = (work // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = ((work % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        is_token = n < vocab
        wide = row.to(tl.int64)
        logits_at = logits_ptr + wide[:, None] * vocab + n[None, :]
        base_at = base_ptr + wide[:, None] * base_stride + n[None, :]
        for position in range(positions):
            entries = table_ptr + _HEADER + position * num_rows + row
            slots = tl.load(entries, mask=row < num_rows, other=-1)
            slots = tl.where(slots < 0, _NONE, slots)
            weights = tl.load(entries + positions * num_rows, mask=row < num_rows, other=0)
            slot = tl.min(slots, axis=0)
            while slot < _NONE:
                word = words_ptr + slot.to(tl.int64) * _WORDS
                mine = slots == slot
                inside = mine[:, None] & is_token[None, :]
                base = tl.load(base_at, mask=inside, other=0.0).to(tl.float32)
                change = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                values = tl.load(word + _ROWS + 1)
                if values != 0:
                    place, has = _looked_up(word, words_ptr, n, is_token)
                    if tl.max(has.to(tl.int32), axis=0) > 0:
                        found = _row_products(
                            x_ptr + wide[:, None] * hidden,
                            pointer_to(values, x_ptr) + place[:, None] * hidden,
                            mine,
                            has,
                            hidden,
                            BLOCK_K,
                        )
                        change += tl.where(has[None, :], found - base, 0.0)
                change += _vector(word + _VECTORS, n, is_token, 1.0)[None, :] * base
                change += _vector(word + _VECTORS + 2, n, is_token, 0.0)[None, :]
                logits = tl.load(logits_at, mask=inside, other=0.0)
                logits += weights.to(tl.float32, bitcast=True)[:, None] * change
                tl.store(logits_at, logits, mask=inside)
                slot = tl.min(tl.where(slots > slot, slots, _NONE), axis=0)
        if HAS_MOVED:
            # What follows may be read by other threads than those that have stored it.
            tl.debug_barrier()
            own = tl.load(table_ptr + _HEADER + row, mask=row < num_rows, other=-1) >= 0
            inside = own[:, None] & is_token[None, :]
            moved_at = moved_ptr + wide[:, None] * moved_stride + n[None, :]
            logits = tl.load(logits_at, mask=inside, other=0.0)
            logits += tl.load(moved_at, mask=inside, other=0.0).to(tl.float32)
            tl.store(logits_at, logits, mask=inside)


def head_changes(
    x: torch.Tensor,
    base: torch.Tensor,
    logits: torch.Tensor,
    words: torch.Tensor,
    table: MemberTable,
    *,
    moved: torch.Tensor | None = None,
) -> None:
    """Change the logits of the table's rows in place.

    Args:
        x: Final hidden states, ``[num_rows, hidden]``, contiguous.
        base: The base's logits, ``[num_rows, vocab]``, dtype of ``x``; rows may be strided.
        logits: The same in fp32, contiguous: what the changes are added to.
        words: What the adapters change, ``[num_slots, WORDS]`` int64, contiguous
            (``vocabulary_words.py``); matrices have the dtype of ``x``, vectors fp32.
        table: The members of each row.
        moved: What the base's head made of ``head_inputs``, as ``base``, or None if no member has
            an input gain.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract. What lies at the addresses is not
            checked: that would synchronise.
    """
    check_float("x", x)
    check_contiguous("x", x)
    num_rows, hidden = x.shape
    vocab = base.shape[1]
    for name, tensor in (("base", base), ("moved", base if moved is None else moved)):
        check_float(name, tensor, x.dtype)
        check_shape(name, tensor, num_rows, vocab)
        check_rows(name, tensor)
    check_float("logits", logits, torch.float32)
    check_shape("logits", logits, num_rows, vocab)
    check_contiguous("logits", logits)
    check_words(words)
    head_changes_kernel[(tuning(x.device).programs,)](
        x,
        base,
        base if moved is None else moved,
        logits,
        words,
        table.buffer,
        hidden,
        vocab,
        base.stride(0),
        base.stride(0) if moved is None else moved.stride(0),
        HAS_MOVED=moved is not None,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        num_warps=4,
        num_stages=wgmma_stages(4),
        enable_fp_fusion=True,
    )
