"""Gradients of the operations between a layer's projections, computed by ``gradients.c``.

Activations are bf16 or fp32; gradients are fp32. The bits of a row depend only on its own sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from turret.kernels.cpu import LANES, by_element, num_threads
from turret.lazy_torch import torch


def add_norm_gradient_(
    total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, eps: float
) -> None:
    """Add the gradient with respect to RMSNorm's input ``x`` (arXiv 1910.07467) to ``total``.

    Args:
        total: ``[rows, width]`` fp32, contiguous.
        x: Same shape, bf16 or fp32.
        weight: ``[width]`` fp32.
        grad: The gradient of the norm's result, ``[rows, width]`` fp32.
        eps: Added to the mean square.
    """
    assert weight.dtype == total.dtype == torch.float32
    assert total.is_contiguous()
    x, grad = x.contiguous(), grad.contiguous()
    by_element("turret_norm_gradient", x.dtype)(
        x.data_ptr(),
        weight.data_ptr(),
        grad.data_ptr(),
        eps,
        total.data_ptr(),
        *x.shape,
        num_threads(),
    )


def gate_gradient(gate_up: torch.Tensor, grad: torch.Tensor, *, is_gelu: bool) -> torch.Tensor:
    """The gradient with respect to the input of ``silu_mul`` or ``gelu_mul`` (``layers.py``).

    Args:
        gate_up: ``[rows, 2 · width]``.
        grad: The gradient of the function's result, ``[rows, width]`` fp32.
        is_gelu: Whether the activation is gelu.

    Returns:
        ``[rows, 2 · width]`` fp32.
    """
    gate_up, grad = gate_up.contiguous(), grad.contiguous()
    out = torch.empty(gate_up.shape)
    by_element("turret_gate_gradient", gate_up.dtype)(
        gate_up.data_ptr(), grad.data_ptr(), out.data_ptr(), *grad.shape, is_gelu, num_threads()
    )
    return out


class _Attention(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("qkv", "cos", "sin", "growth", "sinks", "grad", "out", "scratch", "starts")
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("sequences", "heads", "kv_heads", "dim", "pairs", "is_interleaved"),
                *("window", "stride", "threads"),
            )
        ),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


_QUERIES = 32  # QUERIES in gradients.c


def attention_gradient(
    qkv: torch.Tensor,
    grad: torch.Tensor,
    lengths: Sequence[int],
    *,
    kv_heads: int,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    is_interleaved: bool,
    growth: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The gradients of queries, keys and values in causal attention with rotary positions.

    Args:
        qkv: Before rotary positions, ``[rows, heads + 2 · kv_heads, head_dim]``; head_dim is a
            multiple of 32 and at most ``MAX_HEAD_DIM``.
        grad: The gradient of the result, ``[rows, heads, head_dim]`` fp32.
        lengths: The number of rows of each sequence, in order.
        kv_heads: The number of KV heads.
        angles: Cosines and sines of the rotary positions, ``[rows, pairs]`` fp32 contiguous, or
            None.
        is_interleaved: Whether neighbouring features make a pair.
        growth: Factors of the queries, ``[rows]`` fp32, or None.
        scale: Multiplied into the queries.
        softcap: See ``layers.paged_attention``.
        window: Sliding window in tokens, or None.
        sinks: See ``layers.paged_attention``.

    Returns:
        The gradients, in the shape of ``qkv``, fp32.
    """
    qkv, grad = qkv.contiguous(), grad.contiguous()
    _, total, dim = qkv.shape
    heads = total - 2 * kv_heads
    starts = torch.tensor([0, *lengths]).cumsum(0)
    positions = -(-max(lengths) // LANES) * LANES
    queries = _QUERIES * heads // kv_heads
    stride = 5 * positions * dim + queries * (3 * dim + 2 * positions) + positions
    threads = num_threads()
    out, scratch = torch.empty(qkv.shape), torch.empty(threads, stride)
    cos, sin = (None, None) if angles is None else angles

    def address(tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    job = _Attention(
        *(address(each) for each in (qkv, cos, sin, growth, sinks, grad, out, scratch, starts)),
        *(len(lengths), heads, kv_heads, dim, 0 if cos is None else cos.shape[1], is_interleaved),
        *(window or 0, stride, threads),
        *(scale, softcap or 0.0),
    )
    by_element("turret_attention_gradient", qkv.dtype)(ctypes.byref(job))
    return out
