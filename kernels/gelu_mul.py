"""``gelu(gate) ⊙ up`` (arXiv 1606.08415, by tanh) over a fused gate·up projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gelu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Multiply in fp32; the oracle of the Triton kernel.

    Args:
        gate_up: ``[num_rows, 2 · width]``, the gates first; fp16, bf16 or fp32.

    Returns:
        ``[num_rows, width]``, one rounding to the dtype of ``gate_up``.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)
