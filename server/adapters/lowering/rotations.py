"""Orthogonal matrices from skew ones."""

from __future__ import annotations

import torch


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """``R − I = −2 Q (I + Q)⁻¹`` of ``R = (I − Q)(I + Q)⁻¹``, without what cancels.

    Args:
        skew: ``Q``, ``[blocks, size, size]``, fp32 or wider.
    """
    eye = torch.eye(skew.shape[1], dtype=skew.dtype)
    return torch.linalg.solve(eye + skew, -2.0 * skew, left=False)
