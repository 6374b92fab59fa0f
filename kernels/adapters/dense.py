"""Add the updates of adapters that have a whole matrix for a weight: ``Δ(x) = D x``."""

from __future__ import annotations

import torch

from turret.kernels.cpu.native import has_kernels
from turret.kernels.cpu.products import dot_products
from turret.kernels.rows.linear import row_linear


def dense_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply by torch, or by the products of every dtype where there are compiled kernels.

    The torch path as well as the other kernels' oracle. On a CPU a row's bits do not depend on the
    other rows.

    Args:
        x: Activations, ``[rows, in_features]``, dtype of ``weight``; rows may be strided.
        weight: One adapter's, ``[out_features, in_features]``, contiguous.

    Returns:
        ``Δ(x)``, ``[rows, out_features]`` fp32; where there are no compiled kernels, rounded to the
        dtype of ``x`` before.
    """
    if has_kernels(x.device):
        return dot_products(x.float().unsqueeze(0), weight.unsqueeze(0))[0]
    return row_linear(x, weight).float()
