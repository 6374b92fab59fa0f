"""Add outputs of the base to their partners (RoAd, arXiv 2409.00119).

``Δ(x)_o = sine_o (W x)_p(o)``, where ``p`` exchanges the halves of every group of outputs. With a
gain, ``cosine_o (W x)_o + sine_o (W x)_p(o)`` turns each pair.
"""

from __future__ import annotations

import torch


def partners(width: int, group: int) -> torch.Tensor:
    """``p(o)`` of every output, ``[width]`` int64; ``group`` is even and divides the width."""
    halves = torch.arange(width).view(-1, 2, group // 2)
    return halves.flip(1).flatten()


def pair_rotation_reference(before: torch.Tensor, sine: torch.Tensor, group: int) -> torch.Tensor:
    """Multiply by torch; elementwise, so a row's bits are its own.

    Args:
        before: What the base gave, bias-free, ``[num_rows, out]``, any float dtype.
        sine: ``[out]`` fp32.
        group: Outputs of a group.

    Returns:
        ``[num_rows, out]`` fp32.
    """
    halves = before.unflatten(1, (-1, 2, group // 2))
    return halves.flip(2).flatten(1).float() * sine
