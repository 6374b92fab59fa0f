"""What the base's head multiplies for adapters with input gains: ``x ⊙ Σ_k w_k (l_k − 1)``.

One product of all rows, for all such adapters of a step.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.shared.contract import check_contiguous, check_float, check_shape
from turret.kernels.gpu.tables.member_table import HEADER, MemberTable
from turret.kernels.gpu.vocabulary.vocabulary_words import HEAD_VECTORS, WORDS, check_words

_HEADER, _WORDS = tl.constexpr(HEADER), tl.constexpr(WORDS)
_VECTORS = tl.constexpr(HEAD_VECTORS)
_BLOCK_N = 1024


@triton.jit
def head_inputs_kernel(
    x_ptr,  # [num_rows, hidden]
    z_ptr,  # [num_rows, hidden]
    words_ptr,  # [num_slots, WORDS] int64
    table_ptr,
    hidden,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_feature = n < hidden
    positions = tl.load(table_ptr)
    num_rows = tl.load(table_ptr + 1)
    factor = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if row < num_rows:
        for position in range(positions):
            entry = table_ptr + _HEADER + position * num_rows + row
            slot = tl.load(entry)
            if slot >= 0:
                weight = tl.load(entry + positions * num_rows).to(tl.float32, bitcast=True)
                gain = tl.load(words_ptr + slot.to(tl.int64) * _WORDS + _VECTORS + 1)
                if gain != 0:
                    gain_at = gain.to(tl.pointer_type(tl.float32)) + n
                    factor += weight * (tl.load(gain_at, mask=is_feature, other=1.0) - 1.0)
    at = row.to(tl.int64) * hidden + n
    x = tl.load(x_ptr + at, mask=is_feature, other=0.0).to(tl.float32)
    tl.store(z_ptr + at, (x * factor).to(z_ptr.dtype.element_ty), mask=is_feature)


def head_inputs(x: torch.Tensor, words: torch.Tensor, table: MemberTable) -> torch.Tensor:
    """What the base's head multiplies for the adapters with input gains.

    Args:
        x: Final hidden states, ``[num_rows, hidden]``, contiguous.
        words: What the adapters change, ``[num_slots, WORDS]`` int64, contiguous; input gains are
            fp32.
        table: The members of each row.

    Returns:
        Like ``x``; zero in rows without an input gain.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("x", x)
    check_shape("x", x, -1, -1)
    check_contiguous("x", x)
    check_words(words)
    z = torch.empty_like(x)
    grid = (x.shape[0], triton.cdiv(x.shape[1], _BLOCK_N))
    head_inputs_kernel[grid](
        x, z, words, table.buffer, x.shape[1], BLOCK_N=_BLOCK_N, num_warps=4, enable_fp_fusion=True
    )
    return z
