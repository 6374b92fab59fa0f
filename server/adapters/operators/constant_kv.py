"""Constant keys and values of a layer, to which every token attends (LLaMA-Adapter).

For a row's rotated query ``q_h`` of head ``h``, ``o_h = softmax_p(q_h · k_gp) V_g`` is added to
the result of attention, where ``k_gp`` and ``V_g`` are the constants of the key-value head ``g``
that ``h`` uses. This softmax is separate from that of attention (arXiv 2303.16199, section 3.2).
The values include the paper's gate, which each layer has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from turret.kernels.rows import row_exp_, row_linear
from turret.lazy_torch import torch
from turret.server.adapters.operators import Operator

# Sizes are padded to multiples of this, so that fewer shapes need a trial (``kernels/rows.py``).
_MULTIPLE = 16
# Score of padding positions; its exponential is 0.
_MASKED = -1e30


@dataclass(frozen=True)
class ConstantKv(Operator):
    """See the module docstring.

    This operator has ``attend`` instead of ``add``, because it is not part of a linear module.

    Attributes:
        keys: ``[positions, kv_heads, head_dim]``, serving dtype, contiguous; not rotated, and
            multiplied by the scale of the scores.
        values: Same shape, multiplied by the gate.
    """

    name = "prompt_that_layers_attend_to"
    has_dense = False

    keys: torch.Tensor
    values: torch.Tensor

    @cached_property
    def _wide(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in fp32 for the products, with positions padded to a multiple of 16.

        Keys are ``[kv_heads, positions, head_dim]``, values ``[kv_heads, head_dim + 16,
        positions]``. The 16 rows after the values' features are ones: their products with the
        softmax weights are the sums of these weights, by which ``attend`` divides.
        """
        more = -self.keys.shape[0] % _MULTIPLE
        by_head = self.keys.float().transpose(0, 1)
        columns = torch.nn.functional.pad(
            self.values.float().permute(1, 2, 0), (0, 0, 0, _MULTIPLE)
        )
        columns[:, self.keys.shape[2] :] = 1.0
        keys = torch.nn.functional.pad(by_head, (0, 0, 0, more)).contiguous()
        return keys, torch.nn.functional.pad(columns, (0, more)).contiguous()

    def prepare(self) -> None:
        _ = self._wide

    @property
    def prepared_bytes(self) -> int:
        positions, kv_heads, head_dim = self.keys.shape
        full = positions + -positions % _MULTIPLE
        return 4 * full * kv_heads * (2 * head_dim + _MULTIPLE)

    def attend(self, q: torch.Tensor) -> torch.Tensor:
        """Attend only to the constants.

        Args:
            q: Rotated queries, ``[num_rows, num_heads, head_dim]``, any float dtype.

        Returns:
            ``[num_rows, num_heads, head_dim]`` fp32. A row's bits do not depend on the other rows.
        """
        keys, values = self._wide
        num_rows, head_dim = q.shape[0], q.shape[2]
        grouped = q.float().reshape(num_rows, len(keys), -1, head_dim)
        heads = []
        for g in range(len(keys)):
            rows = grouped[:, g].reshape(-1, head_dim)
            scores = row_linear(rows.contiguous(), keys[g])
            scores[:, self.keys.shape[0] :] = _MASKED
            weights = row_exp_(scores - scores.amax(dim=1, keepdim=True))
            total = row_linear(weights.contiguous(), values[g])
            heads.append(total[:, :head_dim] / total[:, head_dim : head_dim + 1])
        by_head = torch.stack(heads).view(len(keys), num_rows, -1, head_dim)
        return by_head.transpose(0, 1).reshape(q.shape)
