"""``e^x`` whose bits do not depend on the batch.

A library computes it with vector instructions and the last few elements of every thread's share
with others, which may round differently; so the compiled kernel serves, or rows of a width of whole
vectors in calls that were tried (``trial.py``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turret.kernels.cpu.native import functions, has_kernels
from turret.kernels.rows.trial import SAMPLE_ROWS, by_rows

# Elements that the longest vector loop takes at once (AVX-512, 16-bit, unrolled twice).
VECTOR_ELEMENTS = 64


def row_exp_(x: torch.Tensor) -> torch.Tensor:
    """Replace fp32 ``x`` by ``e^x``; each element's bits depend on its row alone. Returns ``x``."""
    if x.device.type != "cpu":
        return x.exp_()
    if has_kernels(x.device):
        out = x.contiguous()
        functions().turret_exp_f32(out.data_ptr(), out.numel())
    else:
        width = x.shape[-1]
        wide = F.pad(x.reshape(-1, width), (0, -width % VECTOR_ELEMENTS))
        out = by_rows("exp", wide.shape[1], torch.exp, wide, lambda: _sample(wide.shape[1]))
        out = out[:, :width].reshape(x.shape)
    return x if out is x else x.copy_(out)


def _sample(width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLE_ROWS, width, generator=generator).mul_(10.0)
