"""gelu by its tanh formula (arXiv 1606.08415), whose bits do not depend on the batch.

``gelu(x) = x / (1 + e^−y)`` with ``y = 2 √(2/π) (x + 0.044715 x³)``: the exponential of ``exp.py``,
and operations that are exact to the last bit.
"""

from __future__ import annotations

import torch

from turret.kernels.rows.exp import row_exp_


def row_gelu(x: torch.Tensor) -> torch.Tensor:
    """Apply gelu to ``[num_rows, width]``, each row bit-identical in any batch; dtype of ``x``."""
    wide = x.float()
    y = (wide * wide).mul_(0.044715).add_(1.0).mul_(wide).mul_(-1.5957691216057308)
    return torch.div(wide, row_exp_(y).add_(1.0)).to(x.dtype)
