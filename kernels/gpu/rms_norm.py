"""Residual addition and RMSNorm in one pass over the residual stream, with a program per row."""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from turret.kernels.gpu.common import check_contiguous, check_float, check_rows, check_shape


@triton.jit
def residual_rms_norm_kernel(
    residual_ptr,  # [num_rows, width]
    update_ptr,  # [num_rows, width] or None
    weight_ptr,  # [width]
    out_ptr,  # [num_rows, width]
    residual_stride,
    update_stride,
    width,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    at = residual_ptr + row * residual_stride + cols
    x = tl.load(at, mask=inside, other=0.0)
    if update_ptr is not None:
        update = tl.load(update_ptr + row * update_stride + cols, mask=inside, other=0.0)
        x = (x.to(tl.float32) + update.to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(at, x, mask=inside)
    x = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    normed = (x * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + cols, normed, mask=inside)


def residual_rms_norm(
    residual: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add ``update`` to ``residual`` in place, and normalise the sum.

    Args:
        residual: ``[num_rows, width]``, fp16, bf16 or fp32, rows may be strided; becomes the sum.
        update: Same shape and dtype, rows may be strided, or None (only normalise).
        weight: ``[width]``, contiguous.
        eps: Added to the mean square.

    Returns:
        ``[num_rows, width]``, dtype of ``residual``, contiguous.

    Raises:
        ValueError: A shape, dtype or stride breaks the contract.
    """
    num_rows, width = residual.shape
    check_float("residual", residual)
    check_rows("residual", residual)
    check_shape("weight", weight, width)
    check_float("weight", weight)
    check_contiguous("weight", weight)
    if update is not None:
        check_shape("update", update, num_rows, width)
        check_float("update", update, residual.dtype)
        check_rows("update", update)
    out = torch.empty(num_rows, width, dtype=residual.dtype, device=residual.device)
    block = triton.next_power_of_2(width)
    residual_rms_norm_kernel[(num_rows,)](
        residual,
        update,
        weight,
        out,
        residual.stride(0),
        0 if update is None else update.stride(0),
        width,
        eps,
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
        enable_fp_fusion=True,
    )
    return out
