"""Products of activated gates and ups: each kernel reads both once and writes the products."""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.common import check_float, check_rows, check_shape

_BLOCK = 1024


@triton.jit
def silu_product(gate, up):
    """``silu(gate) · up`` of fp32 values."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    gate_at = gate_up_ptr + row * stride + cols
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    product = silu_product(gate, up)
    tl.store(out_ptr + row * width + cols, product.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Multiply the silu of the gates by the ups.

    Args:
        gate_up: ``[num_rows, 2 · width]``, the gates first; fp16, bf16 or fp32; rows may be
            strided.

    Returns:
        ``[num_rows, width]``, dtype of ``gate_up``, contiguous.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    return launch_gated(silu_mul_kernel, gate_up)


def launch_gated(kernel: Any, gate_up: torch.Tensor, *numbers: float) -> torch.Tensor:
    """Launch a kernel that multiplies an activation of the gates by the ups.

    Args:
        kernel: A kernel whose arguments are the input, the output, the input's stride, the width,
            ``numbers`` and BLOCK.
        gate_up: The same as in ``silu_mul``. The result and the errors are the same, too.
        numbers: Further arguments of the kernel.
    """
    check_float("gate_up", gate_up)
    check_rows("gate_up", gate_up)
    check_shape("gate_up", gate_up, -1, -1)
    num_rows, double = gate_up.shape
    if double % 2:
        raise ValueError(f"gate_up has {double} columns; an even number is needed")
    width = double // 2
    out = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    kernel[(num_rows, triton.cdiv(width, _BLOCK))](
        gate_up,
        out,
        gate_up.stride(0),
        width,
        *numbers,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


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
    """Multiply the gelu (tanh formula) of the gates by the ups; otherwise like ``silu_mul``."""
    return launch_gated(gelu_mul_kernel, gate_up)


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
        limit: The maximum of gates and ups; the ups' minimum is ``-limit``.

    Returns:
        ``[num_rows, width]``, dtype of ``gate_up``, contiguous.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    return launch_gated(clamped_swiglu_kernel, gate_up, alpha, limit)
