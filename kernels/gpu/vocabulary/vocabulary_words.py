"""What an adapter does to the embedding and the head: words in a table by slot, which kernels read.

The tensors lie in memory of the adapter's own and are found by their addresses: however different
adapters are, a step launches the same. A slot's words, int64, 0 for what it has not::

    rows of the embedding:   ids@ · values@ · count
    its low-rank update:     a@ · b@ · rank · gain@
    rows of the head:        ids@ · values@ · count
    its low-rank update:     a@ · b@ · rank
    the head's other vectors: gain@ · input_gain@ · bias@
"""

# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.shared.contract import check_contiguous, check_shape

WORDS = 16
# Where each of these begins.
EMBEDDING_ROWS, EMBEDDING_LOW_RANK, HEAD_ROWS, HEAD_LOW_RANK, HEAD_VECTORS = 0, 3, 7, 10, 13
# Ranks of a row begin at multiples of this, in what a shrink of the head gives.
RANK_BLOCK = 16


@triton.jit
def place_of(ids_ptr, count, token):
    """Where a token, or each of several, is among ascending ids: the last one not above it."""
    low = token * 0
    size = count
    while size > 1:
        half = size // 2
        low = tl.where(tl.load(ids_ptr + low + half) <= token, low + half, low)
        size -= half
    return low


def check_words(words: torch.Tensor) -> None:
    """Require a table of words by slot.

    Raises:
        ValueError: It is none.
    """
    check_shape("words", words, -1, WORDS)
    if words.dtype != torch.int64:
        raise ValueError(f"words is {words.dtype}; torch.int64 is needed")
    check_contiguous("words", words)
