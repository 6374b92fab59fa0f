"""Triton form of the head's low-rank updates: ``logits += Σ_k w_k B_k (A_k x)`` for a step's rows.

``head_shrink`` gives the rank activations ``A_k x`` in fp32, those of a row's members side by side;
``head_expand`` multiplies them by B and adds the members in their order, in place. It goes through
rows, tokens and mixes as ``head_changes.py`` does.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.shared.addresses import pointer_to
from turret.kernels.gpu.shared.contract import check_contiguous, check_float, check_shape
from turret.kernels.gpu.shared.dots import split_dot
from turret.kernels.gpu.shared.tuning import tuning
from turret.kernels.gpu.tables.member_table import HEADER, MemberTable
from turret.kernels.gpu.vocabulary.vocabulary_words import (
    HEAD_LOW_RANK,
    RANK_BLOCK,
    WORDS,
    check_words,
)

_HEADER, _WORDS = tl.constexpr(HEADER), tl.constexpr(WORDS)
_LOW_RANK = tl.constexpr(HEAD_LOW_RANK)
_NONE = tl.constexpr(2**31 - 1)
# The order of a row's sum: features that are added up side by side.
_BLOCK_K = 256
_BLOCK_M, _BLOCK_N = 64, 64


@triton.jit
def head_shrink_kernel(
    x_ptr,  # [num_rows, hidden]
    v_ptr,  # [num_rows, width] fp32
    words_ptr,  # [num_slots, WORDS] int64
    table_ptr,
    hidden,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0)
    begin = tl.program_id(1) * BLOCK_R
    positions = tl.load(table_ptr)
    num_rows = tl.load(table_ptr + 1)
    k = tl.arange(0, BLOCK_K)
    if row < num_rows:
        for position in range(positions):
            entry = table_ptr + _HEADER + position * num_rows + row
            slot = tl.load(entry)
            if slot >= 0:
                first = tl.load(entry + 2 * positions * num_rows)
                word = words_ptr + slot.to(tl.int64) * _WORDS + _LOW_RANK
                rank = tl.load(word + 2)
                # Of no rank where there is no update.
                if (begin >= first) & (begin < first + rank):
                    a_ptr = pointer_to(tl.load(word), x_ptr)
                    r = begin - first + tl.arange(0, BLOCK_R)
                    a_at = a_ptr + r.to(tl.int64)[:, None] * hidden
                    x_at = x_ptr + row.to(tl.int64) * hidden
                    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
                    for start in range(0, hidden, BLOCK_K):
                        keep = start + k < hidden
                        x = tl.load(x_at + start + k, mask=keep, other=0.0).to(tl.float32)
                        a = tl.load(
                            a_at + (start + k)[None, :],
                            mask=(r < rank)[:, None] & keep[None, :],
                            other=0.0,
                        )
                        acc += a.to(tl.float32) * x[None, :]
                    v_at = v_ptr + row.to(tl.int64) * width + begin + tl.arange(0, BLOCK_R)
                    tl.store(v_at, tl.sum(acc, axis=1))


@triton.jit
def head_expand_kernel(
    v_ptr,  # [num_rows, width] fp32
    logits_ptr,  # [num_rows, vocab] fp32
    like_ptr,  # of the matrices' dtype; not read
    words_ptr,  # [num_slots, WORDS] int64
    table_ptr,
    vocab,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    positions = tl.load(table_ptr)
    num_rows = tl.load(table_ptr + 1)
    column = positions * num_rows
    blocks = tl.cdiv(vocab, BLOCK_N)
    num_work = tl.cdiv(num_rows, BLOCK_M) * blocks
    r = tl.arange(0, BLOCK_R)
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        row = (work // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = ((work % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        is_token = n < vocab
        wide = row.to(tl.int64)
        logits_at = logits_ptr + wide[:, None] * vocab + n[None, :]
        for position in range(positions):
            entries = table_ptr + _HEADER + position * num_rows + row
            slots = tl.load(entries, mask=row < num_rows, other=-1)
            slots = tl.where(slots < 0, _NONE, slots)
            weights = tl.load(entries + column, mask=row < num_rows, other=0)
            firsts = tl.load(entries + 2 * column, mask=row < num_rows, other=0)
            slot = tl.min(slots, axis=0)
            while slot < _NONE:
                word = words_ptr + slot.to(tl.int64) * _WORDS + _LOW_RANK
                rank = tl.load(word + 2)
                if rank != 0:
                    mine = slots == slot
                    v_at = v_ptr + (wide * width + firsts)[:, None]
                    b_at = pointer_to(tl.load(word + 1), like_ptr) + n[None, :]
                    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                    # Few turns: they need no pipeline, and its registers.
                    for start in tl.range(0, rank, BLOCK_R, num_stages=1):
                        keep = start + r < rank
                        v = tl.load(
                            v_at + (start + r)[None, :],
                            mask=mine[:, None] & keep[None, :],
                            other=0.0,
                        )
                        b = tl.load(
                            b_at + (start + r).to(tl.int64)[:, None] * vocab,
                            mask=keep[:, None] & is_token[None, :],
                            other=0.0,
                        )
                        acc = split_dot(v, b, acc)
                    inside = mine[:, None] & is_token[None, :]
                    logits = tl.load(logits_at, mask=inside, other=0.0)
                    logits += weights.to(tl.float32, bitcast=True)[:, None] * acc
                    tl.store(logits_at, logits, mask=inside)
                slot = tl.min(tl.where(slots > slot, slots, _NONE), axis=0)


def head_shrink(
    x: torch.Tensor, words: torch.Tensor, table: MemberTable, width: int
) -> torch.Tensor:
    """``A_k x`` of every row's low-rank updates of the head.

    Args:
        x: Final hidden states, ``[num_rows, hidden]``, contiguous.
        words: What the adapters change, ``[num_slots, WORDS]`` int64, contiguous; matrices have the
            dtype of ``x``.
        table: The members of each row, whose ranks begin at multiples of ``RANK_BLOCK``.
        width: Ranks of a row at most, a multiple of ``RANK_BLOCK``.

    Returns:
        ``[num_rows, width]`` fp32; what is no rank of a row's members was not written.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("x", x)
    check_shape("x", x, -1, -1)
    check_contiguous("x", x)
    check_words(words)
    if width % RANK_BLOCK:
        raise ValueError(f"width is {width}; a multiple of {RANK_BLOCK} is needed")
    num_rows, hidden = x.shape
    v = torch.empty(num_rows, width, dtype=torch.float32, device=x.device)
    head_shrink_kernel[(num_rows, width // RANK_BLOCK)](
        x,
        v,
        words,
        table.buffer,
        hidden,
        width,
        BLOCK_R=RANK_BLOCK,
        BLOCK_K=_BLOCK_K,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return v


def head_expand(
    v: torch.Tensor,
    logits: torch.Tensor,
    words: torch.Tensor,
    table: MemberTable,
    like: torch.Tensor,
) -> None:
    """Add the low-rank updates of the table's rows in place.

    Args:
        v: What ``head_shrink`` gave, ``[num_rows, width]`` fp32, contiguous.
        logits: ``[num_rows, vocab]`` fp32, contiguous.
        words: As above.
        table: As above.
        like: Of the matrices' dtype; not read.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("v", v, torch.float32)
    check_shape("v", v, logits.shape[0], -1)
    check_float("logits", logits, torch.float32)
    check_float("like", like)
    for name, tensor in (("v", v), ("logits", logits)):
        check_contiguous(name, tensor)
    check_words(words)
    head_expand_kernel[(tuning(v.device).programs,)](
        v,
        logits,
        like,
        words,
        table.buffer,
        logits.shape[1],
        v.shape[1],
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        BLOCK_R=RANK_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
