"""The gate of gpt-oss, whose bits do not depend on the batch; see ``kernels/clamped_swiglu.py``.

The exponential of ``exp.py``, and operations that are exact to the last bit.
"""

from __future__ import annotations

import torch

from turret.kernels.rows.exp import row_exp_


def row_clamped_swiglu(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """``[num_rows, 2 · width]``, alternating, to ``[num_rows, width]``; dtype of ``gate_up``.

    Each row is bit-identical in any batch.
    """
    gate, up = gate_up.float().unflatten(1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit).add_(1.0)
    gate = torch.div(gate, row_exp_(gate * -alpha).add_(1.0))
    return gate.mul_(up).to(gate_up.dtype)
