"""A block-circulant update as ``circulant.c`` reads it: in frequencies, padded to whole vectors."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from turret.kernels.cpu.native import LANES
from turret.lazy_torch import torch


@functools.cache
def transforms(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The real transform of ``size`` values and its inverse, fp32.

    Returns:
        ``[2, f, size]``, real and imaginary parts of the ``f = size // 2 + 1`` frequencies, and
        ``[size, 2, f]``.
    """
    frequencies = torch.arange(size // 2 + 1, dtype=torch.float64)
    # Reduce the product modulo the size first: sines of large angles are not exact.
    places = torch.arange(size, dtype=torch.float64)
    angles = torch.outer(frequencies, places).remainder(size) * (2 * math.pi / size)
    forward = torch.stack((angles.cos(), -angles.sin()))
    shares = torch.full((len(frequencies), 1), 2.0 / size, dtype=torch.float64)
    shares[0] = 1.0 / size
    if size % 2 == 0:
        shares[-1] = 1.0 / size
    return forward.float(), (forward * shares).permute(2, 0, 1).float().contiguous()


def spectrum(kernel: torch.Tensor) -> torch.Tensor:
    """The transforms of kernels ``[…, size]``: ``[…, 2, f]`` fp32."""
    forward = transforms(kernel.shape[-1])[0].double()
    return torch.einsum("cfi,...i->...cf", forward, kernel.double()).float()


@dataclass(frozen=True, slots=True)
class CirculantFactors:
    """A block-circulant update in frequencies; see ``operators/circulant.py``.

    Attributes:
        spectra: ``[rows, columns, 2, width]`` fp32, contiguous like all of them; ``width`` is the
            number of frequencies, padded with zeros.
        forward: ``[16, 2, 16]`` fp32; without parts ``[size, 2, width]``.
        turns: ``[parts, 2, width]`` fp32.
        back: ``[parts, 2, width]`` fp32.
        inverse: ``[2, 16, 16]`` fp32; without parts ``[2, width, padded size]``.
        size: Values of a block.
    """

    spectra: torch.Tensor
    forward: torch.Tensor
    turns: torch.Tensor
    back: torch.Tensor
    inverse: torch.Tensor
    size: int

    @classmethod
    def of(cls, kernel: torch.Tensor) -> CirculantFactors:
        """Transform kernels ``[rows, columns, size]``."""
        size, found = kernel.shape[2], spectrum(kernel)
        return cls(_wide(found, found.shape[-1]), *_matrices(size), size)

    @staticmethod
    def transform_products(size: int) -> int:
        """Products of a block's transform, there or back."""
        if size % LANES:
            return size * (size + 2)
        return size * 2 * LANES + size // LANES * 2 * (size + 2)

    @property
    def parts(self) -> int:
        """Number of parts in which a block is transformed; 0 if it is transformed as a whole."""
        return len(self.turns)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows, columns, size and width."""
        rows, columns, _, width = self.spectra.shape
        return rows, columns, self.size, width

    @property
    def scratch(self) -> int:
        """Number of floats that its activations take."""
        rows, columns, size, width = self.sizes
        return (columns + 1) * 2 * width + _padded(rows * size)


def _wide(tensor: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, _padded(size) - size)).contiguous()


@functools.cache
def _matrices(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``forward``, ``turns``, ``back`` and ``inverse``: the same for all updates of a size."""
    if size % LANES:
        forward, inverse = _padded_transforms(size)
        none = torch.empty(0, 2, forward.shape[2])
        return forward, none, none, inverse
    parts, count = size // LANES, size // 2 + 1
    cosines, sines = _turns(torch.arange(LANES), torch.arange(LANES), LANES)
    forward, inverse = torch.stack((cosines, -sines), 1), torch.stack((cosines, -sines))
    cosines, sines = _turns(torch.arange(parts), torch.arange(count), size)
    shares = torch.full((count,), 2.0 / size, dtype=torch.float64)
    shares[0] = shares[-1] = 1.0 / size
    turns, back = torch.stack((cosines, -sines), 1), torch.stack((cosines, sines), 1) * shares
    whole = (forward.float().contiguous(), inverse.float().contiguous())
    return whole[0], _wide(turns.float(), count), _wide(back.float(), count), whole[1]


def _turns(rows: torch.Tensor, columns: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """Cosines and sines of ``2π r c / size``, ``[rows, columns]`` fp64."""
    # Reduce the product modulo the size first: sines of large angles are not exact.
    angles = torch.outer(rows, columns).remainder(size).double() * (2 * math.pi / size)
    return angles.cos(), angles.sin()


def _padded_transforms(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole matrices, padded."""
    forward, inverse = transforms(size)
    count = forward.shape[1]
    made = _wide(forward.permute(2, 0, 1), count)
    back = _wide(inverse.permute(1, 2, 0), size)  # [2, f, padded size]
    return made, torch.nn.functional.pad(back, (0, 0, 0, _padded(count) - count)).contiguous()


def _padded(size: int) -> int:
    return -(-size // LANES) * LANES
