"""Causal attention over a paged KV cache, one row at a time; see ``attention.c``.

The contract is that of ``kernels/paged_attention.py``: a row's result depends on its own query and
keys only. No tiles, no masks and no copies of keys and values: a row walks its own blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from turret.kernels.cpu.native import LANES, by_element, num_threads
from turret.kernels.paged_attention import SequenceSpan

MAX_HEAD_DIM = 256


class NativeAttentionPlan:
    """Attention metadata of a step, shared by all layers with the same window.

    Args:
        spans: The sequences of the step.
        num_heads: Query heads.
        head_dim: A multiple of 16, at most ``MAX_HEAD_DIM``.
        window: Sliding window in tokens, or None.
    """

    def __init__(
        self,
        spans: Sequence[SequenceSpan],
        *,
        num_heads: int,
        head_dim: int,
        window: int | None,
    ) -> None:
        blocks = [block for span in spans for block in span.blocks]
        self._blocks = (ctypes.c_int64 * len(blocks))(*blocks)
        values: list[int] = []
        address = ctypes.addressof(self._blocks)
        longest = 0
        for span in spans:
            values += (span.row_start, span.num_new, span.num_context, span.num_padding, address)
            address += 8 * len(span.blocks)
            longest = max(longest, span.num_context + span.num_new)
        self._spans = (ctypes.c_int64 * len(values))(*values)
        threads = num_threads()
        # Pad by a whole vector: vectors are stored from any position on.
        padded = -(-longest // LANES) * LANES + LANES
        # Large enough for attention.c, one row's heads, and for attention_tiles.h, 16 queries.
        stride = max(num_heads * (2 * head_dim + padded), LANES * (head_dim + padded))
        self._scratch = torch.empty(threads * stride)
        self._plan = (ctypes.c_int64 * 6)(
            ctypes.addressof(self._spans),
            self._scratch.data_ptr(),
            len(spans),
            stride,
            threads,
            window or 0,
        )
        self.address = ctypes.addressof(self._plan)


class _Heads(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "block_size")),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("sinks", ctypes.c_void_p),
    )


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: NativeAttentionPlan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend; every row of ``q`` belongs to a span.

    Args:
        q: Rotated queries, ``[num_rows, num_heads, head_dim]`` fp32, contiguous.
        k_cache: Keys of one layer, ``[num_blocks, block_size, num_kv_heads, head_dim]``, bf16 or
            fp32.
        v_cache: Values, same shape and dtype.
        plan: Of the step.
        scale: Multiplied into the queries.
        softcap: Scores become ``softcap · tanh(score / softcap)`` if it is given.
        sinks: What each head adds to the softmax beside its scores, ``[num_heads]`` fp32
            contiguous, or None.

    Returns:
        ``[num_rows, num_heads, head_dim]``, dtype of the cache.
    """
    _, block_size, kv_heads, head_dim = k_cache.shape
    out = torch.empty(q.shape, dtype=k_cache.dtype)
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.is_contiguous())
    heads = _Heads(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        q.shape[1],
        kv_heads,
        head_dim,
        block_size,
        scale,
        softcap or 0.0,
        None if sinks is None else sinks.data_ptr(),
    )
    by_element("turret_attend", k_cache.dtype)(plan.address, ctypes.addressof(heads))
    return out
