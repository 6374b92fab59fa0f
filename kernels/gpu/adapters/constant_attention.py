"""Triton form of ``constant_attention``: what rows attend to beside their sequences, in place.

A program takes a row and a head, and goes through the members of the row's mix: the constants of
one, 16 at a time, as ``attended`` is made of a sequence's (scores, the largest so far, weights).
The members are added in their order, in fp32, and rounded once.
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

# A slot's words in a layer: keys@ · values@ · positions · 0.
CONSTANT_WORDS = 4
_HEADER, _WORDS = tl.constexpr(HEADER), tl.constexpr(CONSTANT_WORDS)
_BLOCK_P, _LEAST_BLOCK_D = 16, 64


@triton.jit
def constant_attention_kernel(
    q_ptr,  # [num_rows, heads, head_dim]
    attended_ptr,  # the same
    words_ptr,  # [num_slots, CONSTANT_WORDS] int64
    table_ptr,
    q_stride,
    heads,
    kv_heads,
    head_dim,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    positions = tl.load(table_ptr)
    num_rows = tl.load(table_ptr + 1)
    d = tl.arange(0, BLOCK_D)
    is_feature = d < head_dim
    if row < num_rows:
        wide = row.to(tl.int64)
        q_at = q_ptr + wide * q_stride + head * head_dim + d
        q = tl.load(q_at, mask=is_feature, other=0.0).to(tl.float32)
        at = attended_ptr + (wide * heads + head) * head_dim + d
        total = tl.load(at, mask=is_feature, other=0.0).to(tl.float32)
        # Where a key-value head's features lie in a position.
        own = (head // (heads // kv_heads)) * head_dim + d
        members = 0
        for position in range(positions):
            entry = table_ptr + _HEADER + position * num_rows + row
            slot = tl.load(entry)
            if slot >= 0:
                word = words_ptr + slot.to(tl.int64) * _WORDS
                count = tl.load(word + 2)
                # An adapter may leave a layer's attention as it is.
                if count > 0:
                    members += 1
                    weight = tl.load(entry + positions * num_rows).to(tl.float32, bitcast=True)
                    keys_ptr = pointer_to(tl.load(word), q_ptr)
                    values_ptr = pointer_to(tl.load(word + 1), q_ptr)
                    largest = float("-inf")
                    weights_sum = 0.0
                    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
                    for start in range(0, count, BLOCK_P):
                        p = start + tl.arange(0, BLOCK_P)
                        inside = (p < count)[:, None] & is_feature[None, :]
                        where = p.to(tl.int64)[:, None] * (kv_heads * head_dim) + own[None, :]
                        keys = tl.load(keys_ptr + where, mask=inside, other=0.0).to(tl.float32)
                        scores = tl.sum(keys * q[None, :], axis=1)
                        scores = tl.where(p < count, scores, float("-inf"))
                        larger = tl.maximum(largest, tl.max(scores, axis=0))
                        kept = tl.exp(largest - larger)
                        shares = tl.exp(scores - larger)
                        values = tl.load(values_ptr + where, mask=inside, other=0.0)
                        acc = acc * kept + tl.sum(shares[:, None] * values.to(tl.float32), axis=0)
                        weights_sum = weights_sum * kept + tl.sum(shares, axis=0)
                        largest = larger
                    total += weight * (acc / weights_sum)
        if members > 0:
            tl.store(at, total.to(attended_ptr.dtype.element_ty), mask=is_feature)


def constant_attention(
    q: torch.Tensor, attended: torch.Tensor, kv_heads: int, words: torch.Tensor, table: MemberTable
) -> None:
    """Add what the table's rows attend to, in place, one rounding to the dtype of ``attended``.

    Args:
        q: Rotated queries, ``[num_rows, heads, head_dim]``, contiguous but for its rows.
        attended: What attention gave, likewise, contiguous, dtype of ``q``.
        kv_heads: Key-value heads; queries of one lie side by side.
        words: Of one layer, ``[num_slots, CONSTANT_WORDS]`` int64, contiguous: where keys lie,
            where values lie, ``[positions, kv_heads, head_dim]`` each, contiguous, dtype of ``q``,
            beginning at a multiple of 16 bytes, and how many positions; 0 of those is no constants.
        table: The members of each row.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract. What lies at the addresses is not
            checked: that would synchronise.
    """
    num_rows, heads, head_dim = q.shape
    check_float("q", q)
    check_float("attended", attended, q.dtype)
    check_shape("attended", attended, num_rows, heads, head_dim)
    check_contiguous("attended", attended)
    if q.stride()[1:] != (head_dim, 1):
        raise ValueError(f"q has strides {q.stride()}; {(head_dim, 1)} are needed behind the rows")
    if heads % kv_heads:
        raise ValueError(f"{heads} heads do not share {kv_heads} key-value heads")
    check_shape("words", words, -1, CONSTANT_WORDS)
    if words.dtype != torch.int64:
        raise ValueError(f"words is {words.dtype}; torch.int64 is needed")
    check_contiguous("words", words)
    constant_attention_kernel[(num_rows, heads)](
        q,
        attended,
        words,
        table.buffer,
        q.stride(0),
        heads,
        kv_heads,
        head_dim,
        BLOCK_D=max(_LEAST_BLOCK_D, triton.next_power_of_2(head_dim)),
        BLOCK_P=_BLOCK_P,
        num_warps=1,
        enable_fp_fusion=True,
    )
