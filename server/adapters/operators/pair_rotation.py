"""``Δ(x)_o = sine_o (W x)_p(o)``: outputs of the base are added to their partners (RoAd).

``p`` exchanges the halves of every group of outputs (arXiv 2409.00119). Together with a gain
``cosine``, the module computes ``cosine_o (W x)_o + sine_o (W x)_p(o)``, which rotates each pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from turret.lazy_torch import torch
from turret.server.adapters.operators import BaseRows, Operator, ServedWeight


@dataclass(frozen=True, slots=True)
class PairRotation(Operator):
    """Adds the update of the formula above.

    Attributes:
        sine: ``[out_features]``, fp32, signs included.
        group: Number of outputs in a group; even.
    """

    name = "pairs"

    sine: torch.Tensor
    group: int

    def rounded(self, dtype: torch.dtype) -> Self:
        """The operator itself: signs and sines stay in fp32."""
        return self

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        y += self._exchanged(base.result, 1).float() * self.sine * weight

    def add_dense(self, total: torch.Tensor, served: ServedWeight, weight: float) -> None:
        others = self._exchanged(served.weight, 0)
        total.addcmul_(others, self.sine[:, None], value=weight)

    def _exchanged(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        halves = values.unflatten(axis, (-1, 2, self.group // 2))
        return halves.flip(axis + 1).flatten(axis, axis + 2)
