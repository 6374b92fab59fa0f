"""Weights in 8-bit floats (E4M3, arXiv 2209.05433) with a scale, or one for each of their blocks.

So Ministral 3, Qwen3's ``-FP8`` releases and llm-compressor's older checkpoints are stored.
"""

from __future__ import annotations

import torch

from turret.server.words import say

DTYPE = "F8_E4M3"
# Suffixes of a weight's scale. DeepSeek's files call it inverse but mean this same factor.
SCALES = ("_scale_inv", "_scale")
# Scales for 8-bit activations and KV caches, which turret does not use.
NOT_USED = (".activation_scale", ".input_scale", ".k_scale", ".v_scale", ".kv_scale")


def dequantize_float8(
    codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None
) -> torch.Tensor:
    """The numbers that a weight stands for.

    Args:
        codes: ``[out, in]`` float8_e4m3fn.
        scale: A number, or ``[⌈out / rows⌉, ⌈in / columns⌉]``, in any float.
        block: Rows and columns that have a scale in common; needed for more scales than one.

    Returns:
        ``[out, in]`` fp32.

    Raises:
        ValueError: There are not as many scales as blocks.
    """
    values, scale = codes.float(), scale.float()
    if scale.numel() == 1:
        return values * scale.reshape(())
    out, inner = values.shape
    # Without a block size, each row of the weight has one scale.
    rows, columns = block or (1, inner)
    scale = scale.reshape(-1, 1) if scale.dim() == 1 else scale
    expected = -(-out // rows), -(-inner // columns)
    if tuple(scale.shape) != expected:
        raise ValueError(say("SCALES_MISMATCH", found=list(scale.shape), expected=list(expected)))
    spread = scale.repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :inner]
    return values * spread
