"""Triton form of ``silu_mul``: reads gate and up once, writes their product."""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.shared.contract import check_float, check_rows, check_shape

_BLOCK = 1024


@triton.jit
def silu_product(gate, up):
    """``silu(gate) · up``, fp32."""
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
        kernel: Takes input, output, the input's stride, the width, what else it needs, and BLOCK;
            waits for the launches before.
        gate_up: As in ``silu_mul``, and so are the result and the errors.
        numbers: What else it needs.
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
