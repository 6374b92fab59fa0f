"""Triton form of ``combine_reference``: the sum of what a row's experts gave."""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.expert_routing import Routing
from turret.kernels.gpu.shared.contract import check_float, check_rows, check_shape

_BLOCK = 1024


@triton.jit
def combine_experts_kernel(
    y_ptr,  # [num_pairs, width]
    places_ptr,  # [num_rows, per_token] int64
    weights_ptr,  # [num_rows, per_token] fp32
    out_ptr,  # [num_rows, width]
    stride,
    width,
    per_token,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in range(per_token):
        place = tl.load(places_ptr + row * per_token + j)
        weight = tl.load(weights_ptr + row * per_token + j)
        part = tl.load(y_ptr + place * stride + cols, mask=inside, other=0.0)
        total += weight * part.to(tl.float32)
    tl.store(out_ptr + row * width + cols, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine_experts(y: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Sum in fp32, in the order of a row's weights; one rounding.

    Args:
        y: ``[num_pairs, width]``, fp16, bf16 or fp32; rows may be strided.
        routing: The pairs.

    Returns:
        ``[num_rows, width]``, dtype of ``y``, contiguous.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    check_float("y", y)
    check_rows("y", y)
    num_rows, per_token = routing.places.shape
    check_shape("y", y, num_rows * per_token, -1)
    width = y.shape[1]
    out = torch.empty(num_rows, width, dtype=y.dtype, device=y.device)
    combine_experts_kernel[(num_rows, triton.cdiv(width, _BLOCK))](
        y,
        routing.places,
        routing.weights,
        out,
        y.stride(0),
        width,
        per_token,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
