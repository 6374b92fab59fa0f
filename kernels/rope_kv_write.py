"""Head norms, rotary positions and the KV write: what stands between qkv and attention.

Rotary positions (RoFormer, arXiv 2104.09864) turn the first ``2 · pairs`` features of a head; they
pair ``(i, i + pairs)``, as most Hugging Face checkpoints lay them out, or neighbours.
"""

from __future__ import annotations

import torch

from turret.kernels.rms_norm import row_rms_norm


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
    is_interleaved: bool = False,
) -> torch.Tensor:
    """Rotate in fp32 and store; the oracle of the Triton kernel.

    Args:
        qkv: ``[num_rows, (num_heads + 2 · kv_heads) · head_dim]``, fp16, bf16 or fp32.
        cos: ``[num_rows, pairs]`` fp32.
        sin: Same shape.
        kv_slots: ``block · block_size + offset`` per row, ``[num_rows]`` int64.
        k_cache: One layer's keys, ``[num_blocks, block_size, kv_heads, head_dim]``, written.
        v_cache: One layer's values, same shape, written.
        q_norm: RMSNorm weight of the query heads, ``[head_dim]``, fp32 or as ``qkv``, or None.
        k_norm: The same for the key heads.
        eps: Of the norms.
        is_interleaved: Whether neighbouring features make a pair.

    Returns:
        Rotated queries, ``[num_rows, num_heads, head_dim]``, dtype of the cache.
    """
    kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * kv_heads
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None:
        q = row_rms_norm(q.flatten(0, 1), q_norm, eps).view(q.shape)
    if k_norm is not None:
        k = row_rms_norm(k.flatten(0, 1), k_norm, eps).view(k.shape)
    k = rotate_heads(k, cos, sin, is_interleaved=is_interleaved)
    k_cache.flatten(0, 1)[kv_slots] = k.to(k_cache.dtype)
    v_cache.flatten(0, 1)[kv_slots] = v.to(v_cache.dtype)
    return rotate_heads(q, cos, sin, is_interleaved=is_interleaved).to(k_cache.dtype)


def rotate_heads(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, is_interleaved: bool = False
) -> torch.Tensor:
    """Rotary positions on ``[rows, heads, head_dim]``, any float dtype; fp32 result.

    Args:
        x: See above.
        cos: ``[rows, pairs]`` fp32.
        sin: Same shape.
        is_interleaved: Whether neighbouring features make a pair, not (i, i + pairs).
    """
    x = x.float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = x.clone()
    first, second = _pairs(x, cos.shape[-1], is_interleaved)
    out_first, out_second = _pairs(out, cos.shape[-1], is_interleaved)
    # Separate products and sums round alike in vector loops and in the scalar loops for the rest.
    torch.mul(first, cos, out=out_first).sub_(second * sin)
    torch.mul(second, cos, out=out_second).add_(first * sin)
    return out


def _pairs(x: torch.Tensor, count: int, is_interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and second features of the pairs, ``[rows, heads, count]`` each."""
    if is_interleaved:
        return x[..., 0 : 2 * count : 2], x[..., 1 : 2 * count : 2]
    return x[..., :count], x[..., count : 2 * count]
