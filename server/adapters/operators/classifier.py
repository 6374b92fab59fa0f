"""A classification head's weights."""

from __future__ import annotations

from dataclasses import dataclass

from turret.lazy_torch import torch
from turret.server.adapters.operators import Tensors


@dataclass(frozen=True, slots=True)
class Classifier(Tensors):
    """The weights of ``logits = W h + b`` for a final hidden state ``h``; kept in host memory.

    Attributes:
        weight: ``[labels, hidden]``, fp32, contiguous.
        bias: ``[labels]``, fp32, or None (0).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """The logits of one state: ``[hidden]`` on the CPU → ``[labels]`` fp64.

        The product always has one row, so its bits do not depend on a batch.
        """
        logits = (self.weight.double() * state.double()).sum(1)
        return logits if self.bias is None else logits + self.bias
