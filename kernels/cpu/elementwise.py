"""A decoder layer's operations between its matrix products, one pass each (``elementwise.c``)."""

from __future__ import annotations

import torch

from turret.kernels.cpu.native import by_element, num_threads


def add_rms_norm(
    hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """``hidden += delta`` in place, then RMSNorm (arXiv 1910.07467) of the sum.

    Args:
        hidden: ``[rows, width]`` bf16 or fp32, contiguous.
        delta: Same shape and dtype, contiguous, or None.
        weight: ``[width]`` fp32, contiguous.
        eps: Added to the mean square.

    Returns:
        ``[rows, width]``, same dtype, from fp32 by one rounding.
    """
    assert weight.dtype == torch.float32
    assert hidden.is_contiguous()
    rows, width = hidden.shape
    out = torch.empty_like(hidden)
    by_element("turret_add_rms_norm", hidden.dtype)(
        hidden.data_ptr(),
        None if delta is None else delta.data_ptr(),
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        rows,
        width,
        num_threads(),
    )
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) · up`` (arXiv 2002.05202): ``[rows, 2·width]`` → ``[rows, width]``.

    bf16 or fp32, contiguous.
    """
    return _gated_mul("turret_silu_mul", gate_up)


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) · up``, gelu by its tanh formula (arXiv 1606.08415); see ``silu_mul``."""
    return _gated_mul("turret_gelu_mul", gate_up)


def clamped_swiglu(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """``(up + 1) · gate · σ(alpha · gate)``, clamped; see ``kernels/between.py``.

    Args:
        gate_up: ``[rows, 2·width]`` bf16 or fp32, contiguous; gates and ups alternate.
        alpha: Gain of the sigmoid.
        limit: Of gates and ups.

    Returns:
        ``[rows, width]``, same dtype, from fp32 by one rounding.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype)
    by_element("turret_clamped_swiglu", gate_up.dtype)(
        gate_up.data_ptr(), out.data_ptr(), rows, width, alpha, limit, num_threads()
    )
    return out


def _gated_mul(name: str, gate_up: torch.Tensor) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype)
    by_element(name, gate_up.dtype)(gate_up.data_ptr(), out.data_ptr(), rows, width, num_threads())
    return out


def rope_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    is_interleaved: bool = False,
) -> torch.Tensor:
    """Rotate queries and keys (RoFormer, arXiv 2104.09864); store keys and values.

    Args:
        qkv: ``[rows, heads + 2·kv_heads, head_dim]`` bf16 or fp32,
            contiguous; head_dim a multiple of 32.
        cos: ``[rows, pairs]`` fp32, contiguous; ones where a layer has no rotary positions. The
            first ``2 · pairs`` features of a head rotate, the others pass.
        sin: Same shape.
        slots: ``block · block_size + offset`` per row, ``[rows]`` int64.
        k_cache: One layer's, ``[num_blocks, block_size, kv_heads, head_dim]``, dtype of ``qkv``.
        v_cache: Same shape and dtype.
        is_interleaved: Whether neighbouring features make a pair, not (i, i + pairs).

    Returns:
        Rotated queries, ``[rows, heads, head_dim]`` fp32.
    """
    rows, total, head_dim = qkv.shape
    kv_heads = k_cache.shape[2]
    heads = total - 2 * kv_heads
    q = torch.empty(rows, heads, head_dim)
    by_element("turret_rope_kv_write", qkv.dtype)(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        slots.data_ptr(),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        rows,
        heads,
        kv_heads,
        head_dim,
        cos.shape[1],
        is_interleaved,
        num_threads(),
    )
    return q
