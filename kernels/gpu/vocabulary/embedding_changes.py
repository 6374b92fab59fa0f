"""Triton form of ``change_embeddings``: ``e(t) + Σ_k w_k (e_k(t) − e(t))`` in place.

A program takes a row of the step and 256 features, and adds up the members of the row's mix in
their order, in fp32; one rounding at the end. Rows without a member are not touched.

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
    check_shape,
)
from turret.kernels.gpu.tables.member_table import HEADER, MemberTable
from turret.kernels.gpu.vocabulary.vocabulary_words import (
    EMBEDDING_LOW_RANK,
    EMBEDDING_ROWS,
    WORDS,
    check_words,
    place_of,
)

_HEADER, _WORDS = tl.constexpr(HEADER), tl.constexpr(WORDS)
_ROWS, _LOW_RANK = tl.constexpr(EMBEDDING_ROWS), tl.constexpr(EMBEDDING_LOW_RANK)
_BLOCK_N, _BLOCK_R = 256, 8


@triton.jit
def embedding_changes_kernel(
    hidden_ptr,  # [num_rows, hidden]
    tokens_ptr,  # [num_rows] int64
    embedding_ptr,  # [vocab, hidden]
    words_ptr,  # [num_slots, WORDS] int64
    table_ptr,
    hidden,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0)
    positions = tl.load(table_ptr)
    num_rows = tl.load(table_ptr + 1)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_feature = n < hidden
    if row < num_rows:
        token = tl.load(tokens_ptr + row)
        base_at = embedding_ptr + token * hidden + n
        base = tl.load(base_at, mask=is_feature, other=0.0).to(tl.float32)
        total = base
        members = 0
        for position in range(positions):
            entry = table_ptr + _HEADER + position * num_rows + row
            slot = tl.load(entry)
            if slot >= 0:
                members += 1
                weight = tl.load(entry + positions * num_rows).to(tl.float32, bitcast=True)
                word = words_ptr + slot.to(tl.int64) * _WORDS
                values = tl.load(word + _ROWS + 1)
                if values != 0:
                    place = token
                    has = token >= 0
                    ids = tl.load(word + _ROWS)
                    if ids != 0:
                        ids_ptr = pointer_to(ids, words_ptr)
                        place = place_of(ids_ptr, tl.load(word + _ROWS + 2), token)
                        has = tl.load(ids_ptr + place) == token
                    if has:
                        own_at = pointer_to(values, hidden_ptr) + place * hidden + n
                        own = tl.load(own_at, mask=is_feature, other=0.0).to(tl.float32)
                        total += weight * (own - base)
                a = tl.load(word + _LOW_RANK)
                if a != 0:
                    rank = tl.load(word + _LOW_RANK + 2)
                    a_ptr = pointer_to(a, hidden_ptr) + token * rank
                    b_ptr = pointer_to(tl.load(word + _LOW_RANK + 1), hidden_ptr)
                    acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
                    for start in range(0, rank, BLOCK_R):
                        r = start + tl.arange(0, BLOCK_R)
                        left = tl.load(a_ptr + r, mask=r < rank, other=0.0).to(tl.float32)
                        right = tl.load(
                            b_ptr + n.to(tl.int64)[:, None] * rank + r[None, :],
                            mask=is_feature[:, None] & (r < rank)[None, :],
                            other=0.0,
                        )
                        acc += left[None, :] * right.to(tl.float32)
                    change = tl.sum(acc, axis=1)
                    gain = tl.load(word + _LOW_RANK + 3)
                    if gain != 0:
                        gain_ptr = gain.to(tl.pointer_type(tl.float32))
                        factor = tl.load(gain_ptr + n, mask=is_feature, other=1.0)
                        change += (factor - 1.0) * base
                    total += weight * change
        if members > 0:
            at = hidden_ptr + row.to(tl.int64) * hidden + n
            tl.store(at, total.to(hidden_ptr.dtype.element_ty), mask=is_feature)


def embedding_changes(
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    embedding: torch.Tensor,
    words: torch.Tensor,
    table: MemberTable,
) -> None:
    """Change the embeddings of the table's rows in place, one rounding to their dtype.

    Args:
        hidden: The base's embeddings, ``[num_rows, hidden]``, contiguous.
        token_ids: ``[num_rows]`` int64, contiguous; each below the base's vocabulary.
        embedding: The base's matrix, ``[vocab, hidden]``, contiguous, dtype of ``hidden``.
        words: What the adapters change, ``[num_slots, WORDS]`` int64, contiguous
            (``vocabulary_words.py``); matrices have the dtype of ``hidden``, gains fp32.
        table: The members of each row.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract. What lies at the addresses is not
            checked: that would synchronise.
    """
    check_float("hidden", hidden)
    check_float("embedding", embedding, hidden.dtype)
    check_shape("embedding", embedding, -1, hidden.shape[1])
    check_shape("token_ids", token_ids, hidden.shape[0])
    check_words(words)
    for name, tensor in (("hidden", hidden), ("embedding", embedding), ("token_ids", token_ids)):
        check_contiguous(name, tensor)
    grid = (hidden.shape[0], triton.cdiv(hidden.shape[1], _BLOCK_N))
    embedding_changes_kernel[grid](
        hidden,
        token_ids,
        embedding,
        words,
        table.buffer,
        hidden.shape[1],
        BLOCK_N=_BLOCK_N,
        BLOCK_R=_BLOCK_R,
        num_warps=4,
        enable_fp_fusion=True,
    )
