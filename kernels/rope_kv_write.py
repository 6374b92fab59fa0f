"""Head norms, rotary positions and the KV write: what stands between qkv and attention.

Rotary positions (RoFormer, arXiv 2104.09864) pair ``(i, i + head_dim / 2)``, as Hugging Face
checkpoints lay them out; the head norms are Qwen3's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rope_kv_write_reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Rotate in fp32 and store; the oracle of the Triton kernel.

    Args:
        qkv: ``[num_rows, (num_heads + 2 · kv_heads) · head_dim]``, fp16, bf16 or fp32.
        cos: ``[num_rows, head_dim / 2]`` fp32.
        sin: Same shape.
        kv_slots: ``block · block_size + offset`` per row, ``[num_rows]`` int64.
        k_cache: One layer's keys, ``[num_blocks, block_size, kv_heads, head_dim]``, written.
        v_cache: One layer's values, same shape, written.
        q_norm: RMSNorm weight of the query heads, ``[head_dim]``, or None.
        k_norm: The same for the key heads.
        eps: Of the norms.

    Returns:
        Rotated queries, ``[num_rows, num_heads, head_dim]``, dtype of the cache.
    """
    kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * kv_heads
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None:
        q = F.rms_norm(q, q_norm.shape, q_norm, eps)
    if k_norm is not None:
        k = F.rms_norm(k, k_norm.shape, k_norm, eps)
    k_cache.flatten(0, 1)[kv_slots] = _rotate(k, cos, sin).to(k_cache.dtype)
    v_cache.flatten(0, 1)[kv_slots] = v.to(v_cache.dtype)
    return _rotate(q, cos, sin).to(k_cache.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
