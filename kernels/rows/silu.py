"""``silu(x) = x / (1 + e^−x)`` whose bits do not depend on the batch.

torch computes it with vector instructions and the last few elements of every thread's share with
scalar ones, which round differently. Where a share ends depends on the size of the whole tensor: so
rows are filled up to whole vectors and computed in calls that were tried (``trial.py``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turret.kernels.rows.exp import VECTOR_ELEMENTS
from turret.kernels.rows.trial import SAMPLE_ROWS, by_rows


def row_silu(x: torch.Tensor) -> torch.Tensor:
    """Apply silu to ``[num_rows, width]``, each row bit-identical in any batch; dtype of ``x``."""
    if x.device.type != "cpu":
        return F.silu(x)
    width, dtype = x.shape[1], x.dtype
    wide = F.pad(x, (0, -width % VECTOR_ELEMENTS)).contiguous()

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(SAMPLE_ROWS, wide.shape[1], generator=generator).mul_(4.0).to(dtype)

    return by_rows("silu", (dtype, wide.shape[1]), F.silu, wide, sample)[:, :width]
