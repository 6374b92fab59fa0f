"""The rows of a weight on the gpu path, as they are multiplied, made when they are asked for."""

from __future__ import annotations

import torch

from turret.server.models.weights.nf4_gpu import Nf4Product


class ServedRows:
    """A part of a fused weight; ``rows[start:stop]`` writes out that much of it on the device.

    Args:
        product: The fused weight.
        rows: Which of its outputs.
        in_features: Its columns.
        like: Dtype of the result, and device.

    Attributes:
        shape: ``(rows, in_features)``.
        dtype: See above.
        device: See above.
    """

    def __init__(
        self,
        product: Nf4Product,
        rows: slice,
        in_features: int,
        like: tuple[torch.dtype, torch.device],
    ) -> None:
        self.shape = (rows.stop - rows.start, in_features)
        self.dtype, self.device = like
        self._product = product
        self._start = rows.start

    def __getitem__(self, rows: slice) -> torch.Tensor:
        stop = min(rows.stop, self.shape[0])
        part = self._product.part(slice(self._start + rows.start, self._start + stop))
        return part.dequantize(self.dtype)
