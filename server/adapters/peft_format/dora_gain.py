"""DoRA's gain (arXiv 2402.09353): what its magnitudes are to the norms of the updated weight."""

from __future__ import annotations

from turret.lazy_torch import torch
from turret.server.adapters.base import WeightRows

# Rows of W + sBA held at once: 1024 x 14336 in fp32 is 59 MB. An embedding has a column per token,
# so it gets fewer rows.
_ROWS_PER_BLOCK = 1024
_ELEMENTS_PER_BLOCK = 1 << 24


def dora_gain(
    magnitude: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, weight: WeightRows
) -> torch.Tensor:
    """``m / ‖W + s·B A‖`` per output row.

    Args:
        magnitude: ``m``, ``out_features`` values in any shape.
        a: ``[rank, in_features]``.
        b: ``[out_features, rank]``, unscaled.
        scaling: ``s``.
        weight: ``W`` as it is served, ``[out_features, in_features]``; not modified. The norms are
            computed where it is, a block of rows at a time.

    Returns:
        ``[out_features]``, fp32, on the CPU. Rows of norm 0 give inf or NaN, which the caller
        rejects.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = (factor.to(weight.device, wide) for factor in (a, b))
    size = max(1, min(_ROWS_PER_BLOCK, _ELEMENTS_PER_BLOCK // weight.shape[1]))
    norms = []
    for start in range(0, weight.shape[0], size):
        rows = slice(start, start + size)
        merged = torch.addmm(weight[rows].to(wide), b[rows], a, alpha=scaling)
        norms.append(torch.linalg.vector_norm(merged, dim=1, dtype=torch.float64))
    norm = torch.cat(norms).cpu()
    return (magnitude.reshape(-1).to(torch.float64) / norm).to(torch.float32)
