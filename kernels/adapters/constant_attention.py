"""Attention over a few constant keys and values, which every token sees (LLaMA-Adapter).

For one row's rotated query of head ``h`` and the constants of its key-value head ``g``::

    o_h = softmax_p(q_h · k_gp) V_g

What the constants are scaled and gated by is folded into them. Beside a step's attention this is
little work, a product per key-value head (arXiv 2303.16199, section 3.2; the gate is the paper's,
per layer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from turret.kernels.rows.exp import row_exp_
from turret.kernels.rows.linear import row_linear

# Sides are filled up to multiples of this: fewer shapes, fewer trials.
_MULTIPLE = 16
# Of scores of positions that are there to fill up; e to its power is 0.
_MASKED = -1e30


@dataclass(frozen=True, slots=True)
class Constants:
    """Keys and values as the products want them; made once.

    Attributes:
        keys: ``[kv_heads, positions, head_dim]`` fp32, zeros up to a multiple of positions.
        values: ``[kv_heads, head_dim + 16, positions]`` fp32, zeros likewise; behind the features
            are ones, whose products are the sums of weights.
        count: Positions that are not there to fill up.
    """

    keys: torch.Tensor
    values: torch.Tensor
    count: int

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> Constants:
        """Of keys and values, ``[positions, kv_heads, head_dim]`` each, any float dtype."""
        more = -keys.shape[0] % _MULTIPLE
        by_head = keys.float().transpose(0, 1)
        columns = F.pad(values.float().permute(1, 2, 0), (0, 0, 0, _MULTIPLE))
        columns[:, keys.shape[2] :] = 1.0
        return cls(
            F.pad(by_head, (0, 0, 0, more)).contiguous(),
            F.pad(columns, (0, more)).contiguous(),
            keys.shape[0],
        )

    @staticmethod
    def num_bytes(positions: int, kv_heads: int, head_dim: int) -> int:
        """Bytes of both tensors."""
        full = positions + -positions % _MULTIPLE
        return 4 * full * kv_heads * (2 * head_dim + _MULTIPLE)


def constant_attention_reference(q: torch.Tensor, constants: Constants) -> torch.Tensor:
    """Attend to the constants alone.

    Args:
        q: Rotated queries, ``[num_rows, num_heads, head_dim]``, any float dtype.
        constants: Of ``num_heads / queries per head`` key-value heads; keys have the scale.

    Returns:
        ``[num_rows, num_heads, head_dim]`` fp32. A row's bits do not depend on the other rows.
    """
    num_rows, head_dim = q.shape[0], q.shape[2]
    kv_heads = constants.keys.shape[0]
    grouped = q.float().reshape(num_rows, kv_heads, -1, head_dim)
    heads = []
    for g in range(kv_heads):
        rows = grouped[:, g].reshape(-1, head_dim)
        scores = row_linear(rows.contiguous(), constants.keys[g])
        scores[:, constants.count :] = _MASKED
        weights = row_exp_(scores - scores.amax(dim=1, keepdim=True))
        total = row_linear(weights.contiguous(), constants.values[g])
        heads.append(total[:, :head_dim] / total[:, head_dim : head_dim + 1])
    return (
        torch.stack(heads).view(kv_heads, num_rows, -1, head_dim).transpose(0, 1).reshape(q.shape)
    )
