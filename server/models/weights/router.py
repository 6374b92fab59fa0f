"""A router's projection: not quantised, since a small error can choose another expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turret.kernels.cpu.row_adapters import Ahead
from turret.server.models.weights.base_linear import DenseLinear

# Libraries choose their algorithm by shape: on a GPU a product always has this many rows.
_ROWS = 64


class RouterLinear(DenseLinear):
    """``[rows, hidden]`` to a score per expert; see ``BaseLinear``.

    Args:
        weight: ``[experts, hidden]``, in the dtype of activations.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight, (weight.shape[0],))

    def __call__(
        self, x: torch.Tensor, ahead: Ahead | None = None, num_decode: int | None = None
    ) -> torch.Tensor:
        if x.device.type == "cpu":
            return super().__call__(x)
        padded = F.pad(x, (0, 0, 0, -x.shape[0] % _ROWS))
        pieces = [F.linear(piece, self._weight) for piece in padded.split(_ROWS)]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[: x.shape[0]]
