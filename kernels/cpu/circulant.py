"""A block-circulant update as ``circulant.c`` reads it: in frequencies, padded to whole vectors."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from turret.kernels.adapters.circulant import spectrum, transforms

_LANES = 16  # of vec.h


@dataclass(frozen=True, slots=True)
class CirculantFactors:
    """A block-circulant update in frequencies; see ``kernels/adapters/circulant.py``.

    Attributes:
        spectra: ``[rows, columns, 2, width]`` fp32, contiguous like all of them; ``width`` is the
            number of frequencies, padded with zeros.
        forward: ``[size, 2, width]`` fp32.
        inverse: ``[2, width, padded size]`` fp32.
        size: Values of a block.
    """

    spectra: torch.Tensor
    forward: torch.Tensor
    inverse: torch.Tensor
    size: int

    @classmethod
    def of(cls, kernel: torch.Tensor) -> CirculantFactors:
        """From kernels ``[rows, columns, size]``."""
        forward, inverse = _padded_transforms(kernel.shape[2])
        found = spectrum(kernel)
        return cls(_wide(found, found.shape[-1]), forward, inverse, kernel.shape[2])

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows, columns, size and width."""
        rows, columns, _, width = self.spectra.shape
        return rows, columns, self.size, width

    @property
    def scratch(self) -> int:
        """Floats its activations take."""
        rows, columns, size, width = self.sizes
        return (columns + 1) * 2 * width + _padded(rows * size)


def _wide(tensor: torch.Tensor, size: int) -> torch.Tensor:
    return F.pad(tensor, (0, _padded(size) - size)).contiguous()


@functools.cache
def _padded_transforms(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``CirculantFactors.forward`` and ``inverse``: the same for all updates of a size."""
    forward, inverse = transforms(size)
    count = forward.shape[1]
    made = _wide(forward.permute(2, 0, 1), count)
    back = _wide(inverse.permute(1, 2, 0), size)  # [2, f, padded size]
    return made, F.pad(back, (0, 0, 0, _padded(count) - count)).contiguous()


def _padded(size: int) -> int:
    return -(-size // _LANES) * _LANES
