"""Rotates heads and writes keys and values to the cache, with one program per row and head."""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.common import check_contiguous, check_float, check_rows, check_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class KvWrite:
    """The rotation of a layer's heads, and the slots of its keys and values.

    Attributes:
        cos: ``[num_rows, pairs]`` fp32, contiguous; ``2 · pairs`` features of a head rotate.
        sin: Same shape.
        kv_slots: ``block · block_size + offset`` per row, ``[num_rows]`` int64, each at most once.
        k_cache: The layer's keys, ``[num_blocks, block_size, kv_heads, head_dim]``, contiguous.
        v_cache: The layer's values, same shape and dtype.
        is_interleaved: Whether neighbouring features make a pair, not (i, i + pairs).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    kv_slots: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    is_interleaved: bool = False

    @property
    def kv_heads(self) -> int:
        return self.k_cache.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k_cache.shape[3]

    @property
    def pairs(self) -> int:
        return self.cos.shape[1]

    @property
    def is_partial(self) -> bool:
        """Whether some features of a head do not rotate."""
        return 2 * self.pairs != self.head_dim

    def num_heads(self, width: int) -> int:
        """The number of query heads among ``width`` columns of queries, keys and values."""
        return width // self.head_dim - 2 * self.kv_heads

    def divides(self, columns: int) -> bool:
        """Whether tiles with this many columns contain whole heads."""
        return columns % self.head_dim == 0

    def empty_queries(self, num_rows: int, width: int) -> torch.Tensor:
        """Allocate the queries, ``[num_rows, num_heads, head_dim]``."""
        shape = num_rows, self.num_heads(width), self.head_dim
        return torch.empty(shape, dtype=self.k_cache.dtype, device=self.k_cache.device)

    def rows(self, start: int, stop: int) -> KvWrite:
        """The write for some of the rows."""
        return KvWrite(
            cos=self.cos[start:stop],
            sin=self.sin[start:stop],
            kv_slots=self.kv_slots[start:stop],
            k_cache=self.k_cache,
            v_cache=self.v_cache,
            is_interleaved=self.is_interleaved,
        )

    def check(self, num_rows: int, width: int) -> None:
        """Raise ValueError unless this many rows and columns are supported."""
        if width % self.head_dim or self.num_heads(width) < 1:
            raise ValueError(
                f"qkv has {width} columns; a multiple of {self.head_dim} is needed, over "
                f"{2 * self.kv_heads * self.head_dim}"
            )
        for name, values in (("cos", self.cos), ("sin", self.sin)):
            check_float(name, values, torch.float32)
            check_shape(name, values, num_rows, self.pairs)
            check_contiguous(name, values)
        if 2 * self.pairs > self.head_dim:
            raise ValueError(f"cos is for {2 * self.pairs} features; a head has {self.head_dim}")
        check_shape("kv_slots", self.kv_slots, num_rows)
        check_shape("v_cache", self.v_cache, *self.k_cache.shape)
        check_float("v_cache", self.v_cache, self.k_cache.dtype)
        check_contiguous("k_cache", self.k_cache)
        check_contiguous("v_cache", self.v_cache)


@triton.jit
def rotated(first, second, cos, sin):
    """The rotated features of a pair. The explicit ``fma`` makes every kernel round alike."""
    return tl.fma(first, cos, -(second * sin)), tl.fma(second, cos, first * sin)


@triton.jit
def pair_of(h, half, pairs, PARTIAL: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The features of pair ``h``. Features that do not rotate form pairs too, with angle 0."""
    i = h
    j = half + h
    if INTERLEAVED:
        i = tl.where(h < pairs, 2 * h, pairs + h)
        j = tl.where(h < pairs, 2 * h + 1, half + h)
    elif PARTIAL:
        i = tl.where(h < pairs, h, pairs + h)
        j = tl.where(h < pairs, pairs + h, half + h)
    return i, j


@triton.jit
def store_heads(
    first,  # [M, C] fp32, rounded as a projection's result is: first features of pairs
    second,  # the same for the second features of pairs
    rows,  # [M] int64
    live,  # [M], whether each of these rows exists
    head,  # [C], each pair's head: queries first, then keys, then values
    h,  # [C], the pair's number in the head
    i,  # [C], the pair's features
    j,
    cos_ptr, sin_ptr, kv_slots_ptr, q_ptr, k_cache_ptr, v_cache_ptr,  # as in rope_kv_write
    num_heads, kv_heads, half, pairs,
):  # fmt: skip
    """Rotate some heads of some rows and store them as queries, keys and values."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    keep = live[:, None] & (head < num_heads + 2 * kv_heads)[None, :]
    has_angle = (head < num_heads + kv_heads) & (h < pairs)
    angle_at = rows[:, None] * pairs + h[None, :]
    cos = tl.load(cos_ptr + angle_at, mask=keep & has_angle[None, :], other=1.0)
    sin = tl.load(sin_ptr + angle_at, mask=keep & has_angle[None, :], other=0.0)
    turned_first, turned_second = rotated(first, second, cos, sin)
    is_value = (head >= num_heads + kv_heads)[None, :]
    first = tl.where(is_value, first, turned_first).to(dtype)
    second = tl.where(is_value, second, turned_second).to(dtype)
    q_at = q_ptr + (rows * num_heads * 2 * half)[:, None] + (head * 2 * half)[None, :]
    is_query = keep & (head < num_heads)[None, :]
    tl.store(q_at + i[None, :], first, mask=is_query)
    tl.store(q_at + j[None, :], second, mask=is_query)
    slot = tl.load(kv_slots_ptr + rows, mask=live, other=0) * kv_heads * 2 * half
    kv_at = slot[:, None] + ((head - num_heads) * 2 * half)[None, :]
    is_key = keep & (head >= num_heads)[None, :] & (head < num_heads + kv_heads)[None, :]
    tl.store(k_cache_ptr + kv_at + i[None, :], first, mask=is_key)
    tl.store(k_cache_ptr + kv_at + j[None, :], second, mask=is_key)
    kv_at -= kv_heads * 2 * half
    tl.store(v_cache_ptr + kv_at + i[None, :], first, mask=keep & is_value)
    tl.store(v_cache_ptr + kv_at + j[None, :], second, mask=keep & is_value)


@triton.jit
def _head_norm(first, second, weight_ptr, i, j, inside, half, eps, dtype: tl.constexpr):
    """RMSNorm over both halves of a head, rounded like a stored result."""
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
    i, j = pair_of(h, half, pairs, PARTIAL, INTERLEAVED)
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
        first, second = rotated(first, second, cos, sin)
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
    write: KvWrite,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Normalise the heads if there are norms, rotate them, and store keys and values.

    Args:
        qkv: ``[num_rows, (num_heads + 2 · kv_heads) · head_dim]``, fp16, bf16 or fp32; rows may be
            strided.
        write: The rotation of the heads, and the slots of keys and values.
        q_norm: RMSNorm weight of the query heads, ``[head_dim]`` contiguous, or None.
        k_norm: The same for the key heads.
        eps: The epsilon of the norms.

    Returns:
        Rotated queries, ``[num_rows, num_heads, head_dim]``, dtype of the cache, contiguous.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    num_rows, width = qkv.shape
    check_float("qkv", qkv)
    check_rows("qkv", qkv)
    write.check(num_rows, width)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_shape(name, norm, write.head_dim)
            check_contiguous(name, norm)
    q, half = write.empty_queries(num_rows, width), write.head_dim // 2
    rope_kv_write_kernel[(num_rows, width // write.head_dim)](
        qkv,
        write.cos,
        write.sin,
        write.kv_slots,
        q_norm,
        k_norm,
        q,
        write.k_cache,
        write.v_cache,
        qkv.stride(0),
        write.num_heads(width),
        write.kv_heads,
        half,
        write.pairs,
        eps,
        PARTIAL=write.is_partial,
        INTERLEAVED=write.is_interleaved,
        BLOCK=triton.next_power_of_2(half),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return q
