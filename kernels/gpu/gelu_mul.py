"""Triton form of ``gelu_mul``: reads gate and up once, writes their product."""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.silu_mul import launch_gated


@triton.jit
def gelu_mul_kernel(gate_up_ptr, out_ptr, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    gate_at = gate_up_ptr + row * stride + cols
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    # y = 2 * sqrt(2 / pi) * (x + 0.044715 * x ** 3), since gelu(x) = x * sigmoid(y).
    y = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    product = gate / (1.0 + tl.exp(-y)) * up
    tl.store(out_ptr + row * width + cols, product.to(out_ptr.dtype.element_ty), mask=inside)


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Multiply the gelu of the gates by the ups, gelu by its tanh formula.

    Args:
        gate_up: ``[num_rows, 2 · width]``, the gates first; fp16, bf16 or fp32; rows may be
            strided.

    Returns:
        ``[num_rows, width]``, dtype of ``gate_up``, contiguous.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    return launch_gated(gelu_mul_kernel, gate_up)
