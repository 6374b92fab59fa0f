"""Residual addition and RMSNorm (arXiv 1910.07467) in one: what stands between two sublayers.

``residual ← residual + update`` (rounded to its dtype, as the residual stream is stored), then
``normed = residual / sqrt(mean(residual²) + eps) ⊙ weight``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turret.kernels.rows.trial import SAMPLE_ROWS, by_rows


def residual_rms_norm_reference(
    residual: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add in place and normalise; the oracle of the Triton kernel.

    Args:
        residual: ``[num_rows, width]``, fp16, bf16 or fp32; becomes the sum.
        update: Same shape and dtype, or None (only normalise).
        weight: ``[width]``, same dtype or fp32.
        eps: Added to the mean square.

    Returns:
        ``[num_rows, width]``, dtype of ``residual``.
    """
    if update is not None:
        residual += update
    return row_rms_norm(residual, weight, eps)


def row_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm by torch.

    Args:
        x: ``[num_rows, width]``, fp16, bf16 or fp32.
        weight: ``[width]``, same dtype or fp32.
        eps: Added to the mean square.

    Returns:
        ``[num_rows, width]``, dtype of ``x``; on a CPU a row's bits are the same in any batch.
    """

    def compute(rows: torch.Tensor) -> torch.Tensor:
        if rows.dtype == weight.dtype:
            return F.rms_norm(rows, weight.shape, weight, eps)
        return F.rms_norm(rows.float(), weight.shape, weight.float(), eps).to(rows.dtype)

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(SAMPLE_ROWS, x.shape[1], generator=generator).to(x.dtype)

    if x.device.type != "cpu":
        return compute(x)
    return by_rows("norm", (x.dtype, weight.dtype, x.shape[1]), compute, x, sample)
