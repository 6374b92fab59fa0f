"""Products of the weight served with a few vectors, block by block and where it is kept."""

from __future__ import annotations

from turret.lazy_torch import torch
from turret.server.adapters.base import WeightRows

# Elements of the weight held at once: 1024 x 14336 in fp32 is 59 MB.
_ELEMENTS_PER_BLOCK = 1 << 24


def weight_times(weight: WeightRows, right: torch.Tensor) -> torch.Tensor:
    """``W @ right``.

    Args:
        weight: ``[out_features, in_features]``; not modified.
        right: ``[in_features, count]``, fp32 or wider.

    Returns:
        ``[out_features, count]`` in ``right``'s dtype, on the CPU.
    """
    right = right.to(weight.device)
    return torch.cat([weight[rows].to(right.dtype) @ right for rows in _blocks(weight)]).cpu()


def times_weight(left: torch.Tensor, weight: WeightRows) -> torch.Tensor:
    """``left @ W``.

    Args:
        left: ``[count, out_features]``, fp32 or wider.
        weight: ``[out_features, in_features]``; not modified.

    Returns:
        ``[count, in_features]`` in ``left``'s dtype, on the CPU.
    """
    left = left.to(weight.device)
    total = left.new_zeros(left.shape[0], weight.shape[1])
    for rows in _blocks(weight):
        total += left[:, rows] @ weight[rows].to(left.dtype)
    return total.cpu()


def _blocks(weight: WeightRows) -> list[slice]:
    size = max(1, _ELEMENTS_PER_BLOCK // weight.shape[1])
    return [slice(start, start + size) for start in range(0, weight.shape[0], size)]
