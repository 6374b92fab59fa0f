"""``c · tanh(x / c)``, which holds scores and logits within ±c; bits do not depend on the batch.

By the exponential of ``exp.py`` and operations that are exact to the last bit.
"""

from __future__ import annotations

import torch

from turret.kernels.rows.exp import row_exp_


def row_softcap_(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Cap fp32 ``x`` in place; each element's bits depend on its row alone. Returns ``x``."""
    # c · tanh(x / c) = c − 2c / (e^(2x/c) + 1), within 2e-7 · c.
    row_exp_(x.mul_(2.0 / cap)).add_(1.0)
    return torch.div(-2.0 * cap, x, out=x).add_(cap)
