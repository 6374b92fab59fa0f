"""Triton form of ``rope_kv_write``: a program a row and head, straight from qkv to the cache."""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.shared.contract import (
    check_contiguous,
    check_float,
    check_rows,
    check_shape,
)


@triton.jit
def _head_norm(first, second, weight_ptr, i, j, inside, half, eps, dtype: tl.constexpr):
    """RMSNorm over both halves of a head, rounded as the norm's result is stored."""
    mean = (tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / (2 * half)
    scale = 1.0 / tl.sqrt(mean + eps)
    weight_first = tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    weight_second = tl.load(weight_ptr + j, mask=inside, other=0.0).to(tl.float32)
    first = (first * scale * weight_first).to(dtype).to(tl.float32)
    second = (second * scale * weight_second).to(dtype).to(tl.float32)
    return first, second


@triton.jit
def rope_kv_write_kernel(
    qkv_ptr,  # [num_rows, (num_heads + 2 * kv_heads) * 2 * half]
    cos_ptr,  # [num_rows, pairs] fp32
    sin_ptr,
    kv_slots_ptr,  # [num_rows] int64
    q_norm_ptr,  # [2 * half] or None
    k_norm_ptr,
    q_ptr,  # [num_rows, num_heads, 2 * half]
    k_cache_ptr,  # [slots, kv_heads, 2 * half]
    v_cache_ptr,
    qkv_stride,
    num_heads,
    kv_heads,
    half,
    pairs,
    eps,
    PARTIAL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    h = tl.arange(0, BLOCK)
    inside = h < half
    # The features of a pair. Those that do not rotate make pairs as well, which turn by 0.
    i = h
    j = half + h
    if INTERLEAVED:
        i = tl.where(h < pairs, 2 * h, pairs + h)
        j = tl.where(h < pairs, 2 * h + 1, half + h)
    elif PARTIAL:
        i = tl.where(h < pairs, h, pairs + h)
        j = tl.where(h < pairs, pairs + h, half + h)
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    at = qkv_ptr + row * qkv_stride + head * 2 * half
    first = tl.load(at + i, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + j, mask=inside, other=0.0).to(tl.float32)
    kv_head = tl.load(kv_slots_ptr + row) * kv_heads + head - num_heads
    if head < num_heads + kv_heads:
        if q_norm_ptr is not None and head < num_heads:
            first, second = _head_norm(first, second, q_norm_ptr, i, j, inside, half, eps, dtype)
        if k_norm_ptr is not None and head >= num_heads:
            first, second = _head_norm(first, second, k_norm_ptr, i, j, inside, half, eps, dtype)
        cos = tl.load(cos_ptr + row * pairs + h, mask=h < pairs, other=1.0)
        sin = tl.load(sin_ptr + row * pairs + h, mask=h < pairs, other=0.0)
        rotated = first * cos - second * sin
        second = second * cos + first * sin
        first = rotated
        if head < num_heads:
            out_ptr = q_ptr + (row * num_heads + head) * 2 * half
        else:
            out_ptr = k_cache_ptr + kv_head * 2 * half
    else:
        out_ptr = v_cache_ptr + (kv_head - kv_heads) * 2 * half
    tl.store(out_ptr + i, first.to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + j, second.to(q_ptr.dtype.element_ty), mask=inside)


def rope_kv_write(
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
    """Norm and rotate the heads, store keys and values.

    Args:
        qkv: ``[num_rows, (num_heads + 2 · kv_heads) · head_dim]``, fp16, bf16 or fp32; rows may be
            strided.
        cos: ``[num_rows, pairs]`` fp32, contiguous; ``2 · pairs`` features of a head rotate.
        sin: Same shape.
        kv_slots: ``block · block_size + offset`` per row, ``[num_rows]`` int64, each at most once.
        k_cache: One layer's keys, ``[num_blocks, block_size, kv_heads, head_dim]``, contiguous.
        v_cache: One layer's values, same shape and dtype.
        q_norm: RMSNorm weight of the query heads, ``[head_dim]`` contiguous, or None.
        k_norm: The same for the key heads.
        eps: Of the norms.
        is_interleaved: Whether neighbouring features make a pair, not (i, i + pairs).

    Returns:
        Rotated queries, ``[num_rows, num_heads, head_dim]``, dtype of the cache, contiguous.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    num_rows = qkv.shape[0]
    kv_heads, head_dim = k_cache.shape[2:]
    half = head_dim // 2
    num_heads = qkv.shape[1] // head_dim - 2 * kv_heads
    _check(qkv, cos, sin, k_cache, v_cache)
    check_shape("kv_slots", kv_slots, num_rows)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_shape(name, norm, head_dim)
            check_contiguous(name, norm)
    q = torch.empty(num_rows, num_heads, head_dim, dtype=k_cache.dtype, device=qkv.device)
    rope_kv_write_kernel[(num_rows, num_heads + 2 * kv_heads)](
        qkv,
        cos,
        sin,
        kv_slots,
        q_norm,
        k_norm,
        q,
        k_cache,
        v_cache,
        qkv.stride(0),
        num_heads,
        kv_heads,
        half,
        cos.shape[1],
        eps,
        PARTIAL=cos.shape[1] != half,
        INTERLEAVED=is_interleaved,
        BLOCK=triton.next_power_of_2(half),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return q


def _check(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    head_dim = k_cache.shape[3]
    check_float("qkv", qkv)
    check_rows("qkv", qkv)
    if qkv.shape[1] % head_dim:
        raise ValueError(f"qkv has {qkv.shape[1]} columns; a multiple of {head_dim} is needed")
    for name, values in (("cos", cos), ("sin", sin)):
        check_float(name, values, torch.float32)
        check_shape(name, values, qkv.shape[0], cos.shape[1])
        check_contiguous(name, values)
    if 2 * cos.shape[1] > head_dim:
        raise ValueError(f"cos is for {2 * cos.shape[1]} features; a head has {head_dim}")
    check_shape("v_cache", v_cache, *k_cache.shape)
    check_float("v_cache", v_cache, k_cache.dtype)
    check_contiguous("k_cache", k_cache)
    check_contiguous("v_cache", v_cache)
