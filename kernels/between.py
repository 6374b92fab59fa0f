"""The operations between projections in torch: norms, activations and rotations.

Residual addition and RMSNorm (arXiv 1910.07467) are one operation:

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


# The gate of gpt-oss (arXiv 2508.10925) over a fused projection of gates and ups::
#
#     g = min(gate, limit)    u = min(max(up, -limit), limit)    (u + 1) · g · σ(alpha · g)
#
# Gates and ups alternate, as in gpt-oss' checkpoints and in adapters.


def clamped_swiglu_reference(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """Compute in fp32; the oracle of the Triton kernel.

    Args:
        gate_up: ``[num_rows, 2 · width]``, gates at even columns; fp16, bf16 or fp32.
        alpha: Gain of the sigmoid.
        limit: The maximum of gates and ups; the ups' minimum is ``-limit``.

    Returns:
        ``[num_rows, width]``, one rounding to the dtype of ``gate_up``.
    """
    gate, up = gate_up.float().unflatten(1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * (alpha * gate).sigmoid()).to(gate_up.dtype)


# Rotary positions (RoFormer, arXiv 2104.09864).
#
# The first ``2 · pairs`` features of a head rotate. The pairs are ``(i, i + pairs)``, as in most
# Hugging Face checkpoints, or neighbours.


def rotate_heads(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, is_interleaved: bool = False
) -> torch.Tensor:
    """Rotary positions on ``[rows, heads, head_dim]``, any float dtype; fp32 result.

    Args:
        x: The heads, as above.
        cos: ``[rows, pairs]`` fp32.
        sin: Same shape.
        is_interleaved: Whether neighbouring features make a pair, not (i, i + pairs).
    """
    x = x.float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = x.clone()
    first, second = _pairs(x, cos.shape[-1], is_interleaved)
    out_first, out_second = _pairs(out, cos.shape[-1], is_interleaved)
    # Separate products and sums round alike in vector loops and in the scalar loops for the rest.
    out_first.copy_((first * cos).sub_(second * sin))
    out_second.copy_((second * cos).add_(first * sin))
    return out


def _pairs(x: torch.Tensor, count: int, is_interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and second features of the pairs, ``[rows, heads, count]`` each."""
    if is_interleaved:
        return x[..., 0 : 2 * count : 2], x[..., 1 : 2 * count : 2]
    return x[..., :count], x[..., count : 2 * count]
