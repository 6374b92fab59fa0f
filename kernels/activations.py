"""``silu(gate) ⊙ up`` (SwiGLU, arXiv 2002.05202) over a fused gate·up projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Multiply in fp32; the oracle of the Triton kernel.

    Args:
        gate_up: ``[num_rows, 2 · width]``, the gates first; fp16, bf16 or fp32.

    Returns:
        ``[num_rows, width]``, one rounding to the dtype of ``gate_up``.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


# ``gelu(gate) ⊙ up`` over a fused gate·up projection, by gelu's tanh formula (arXiv 1606.08415).


def gelu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Multiply in fp32; the oracle of the Triton kernel.

    Args:
        gate_up: ``[num_rows, 2 · width]``, the gates first; fp16, bf16 or fp32.

    Returns:
        ``[num_rows, width]``, one rounding to the dtype of ``gate_up``.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


# The gate of gpt-oss (arXiv 2508.10925) over a fused projection of gates and ups.
#
# ::
#
#     g = min(gate, limit)    u = min(max(up, -limit), limit)    (u + 1) · g · σ(alpha · g)
#
# Gates and ups alternate: its checkpoints have them so, and so have adapters.


def clamped_swiglu_reference(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """Compute in fp32; the oracle of the Triton kernel.

    Args:
        gate_up: ``[num_rows, 2 · width]``, gates at even columns; fp16, bf16 or fp32.
        alpha: Gain of the sigmoid.
        limit: Of gates and ups.

    Returns:
        ``[num_rows, width]``, one rounding to the dtype of ``gate_up``.
    """
    gate, up = gate_up.float().unflatten(1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * (alpha * gate).sigmoid()).to(gate_up.dtype)
