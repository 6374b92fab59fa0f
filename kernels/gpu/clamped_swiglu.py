"""Triton form of ``clamped_swiglu``: reads gates and ups once, writes their product."""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.silu_mul import launch_gated


@triton.jit
def clamped_swiglu_kernel(
    gate_up_ptr,  # [num_rows, 2 * width], alternating
    out_ptr,  # [num_rows, width]
    stride,
    width,
    alpha,
    limit,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pairs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    both = tl.load(gate_up_ptr + row * stride + cols, mask=cols < 2 * width, other=0.0)
    gate, up = tl.split(tl.reshape(both.to(tl.float32), (BLOCK, 2)))
    # Use comparisons instead of tl.minimum so that NaN stays NaN.
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, up)
    up = tl.where(up < -limit, -limit, up)
    product = (up + 1.0) * (gate / (1.0 + tl.exp(-alpha * gate)))
    out_at = out_ptr + row * width + pairs
    tl.store(out_at, product.to(out_ptr.dtype.element_ty), mask=pairs < width)


def clamped_swiglu(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """Compute ``(up + 1) · gate · σ(alpha · gate)`` of clamped gates and ups.

    Args:
        gate_up: ``[num_rows, 2 · width]``, gates at even columns; fp16, bf16 or fp32; rows may be
            strided.
        alpha: Gain of the sigmoid.
        limit: Of gates and ups.

    Returns:
        ``[num_rows, width]``, dtype of ``gate_up``, contiguous.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    return launch_gated(clamped_swiglu_kernel, gate_up, alpha, limit)
