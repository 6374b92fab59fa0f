"""Residual addition and RMSNorm (arXiv 1910.07467) in one: what stands between two sublayers.

``residual ← residual + update`` (rounded to its dtype, as the residual stream is stored), then
``normed = residual / sqrt(mean(residual²) + eps) ⊙ weight``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def residual_rms_norm_reference(
    residual: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add in place and normalise; the oracle of the Triton kernel.

    Args:
        residual: ``[num_rows, width]``, fp16, bf16 or fp32; becomes the sum.
        update: Same shape and dtype, or None (only normalise).
        weight: ``[width]``, same dtype.
        eps: Added to the mean square.

    Returns:
        ``[num_rows, width]``, dtype of ``residual``.
    """
    if update is not None:
        residual += update
    return F.rms_norm(residual, weight.shape, weight, eps)
