"""Block-circulant updates (C3A, arXiv 2407.19342).

With ``x`` and the result read as matrices with a row of ``b`` values per block::

    Δ(x)_m,j = Σ_n Σ_i kernel_m,n,(i − j) mod b · x_n,i

a correlation per pair of blocks. In frequencies it is a product: with ``X_n`` and ``K_mn`` the
transforms of ``x_n`` and of a kernel, ``Δ_m`` is the inverse transform of ``Σ_n X_n conj(K_mn)``.
The transforms are products with constant matrices here, whose sums run in an order of ours.
"""

from __future__ import annotations

import functools
import math

import torch

from turret.kernels.rows.product import row_product


@functools.cache
def transforms(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The real transform of ``size`` values and its inverse, fp32.

    Returns:
        ``[2, f, size]``, real and imaginary parts of the ``f = size // 2 + 1`` frequencies, and
        ``[size, 2, f]``.
    """
    frequencies = torch.arange(size // 2 + 1, dtype=torch.float64)
    # The product is taken modulo the size first: sines of large angles are not exact.
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


def circulant_reference(x: torch.Tensor, spectra: torch.Tensor, size: int) -> torch.Tensor:
    """Multiply by torch; the CPU path without compiled kernels, and the kernels' oracle.

    A row's bits do not depend on the other rows.

    Args:
        x: Activations, ``[num_rows, in]``, any float dtype; rows may be strided.
        spectra: ``spectrum`` of the kernels, ``[out / size, in / size, 2, f]`` fp32.
        size: Values of a block.

    Returns:
        ``Δ(x)``, ``[num_rows, out]`` fp32.
    """
    forward, inverse = transforms(size)
    blocks = x.float().unflatten(1, (-1, size)).contiguous()
    found = row_product(blocks, forward.flatten(0, 1).to(x.device))
    found = found.unflatten(2, (2, -1))  # [rows, n, 2, f]
    real = x.new_zeros(len(x), spectra.shape[0], spectra.shape[3], dtype=torch.float32)
    imaginary = torch.zeros_like(real)
    for n in range(spectra.shape[1]):
        x_real, x_imaginary = found[:, n, :1], found[:, n, 1:]
        k_real, k_imaginary = spectra[:, n, 0], spectra[:, n, 1]
        real += x_real * k_real + x_imaginary * k_imaginary
        imaginary += x_imaginary * k_real - x_real * k_imaginary
    both = torch.cat((real, imaginary), dim=2)
    return row_product(both, inverse.flatten(1).to(x.device)).flatten(1)
