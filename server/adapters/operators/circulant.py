"""``Δ(x)_m,j = Σ_n Σ_i kernel_m,n,(i − j) mod b · x_n,i`` (C3A, arXiv 2407.19342).

``x`` and the result are read as matrices with a row of ``b`` values per block. Each pair of an
input block and an output block has a circulant matrix, which computes a circular correlation. In
the frequency domain, a correlation is a product: with ``X_n`` and ``K_mn`` the Fourier transforms
of ``x_n`` and of a kernel, ``Δ_m`` is the inverse transform of ``Σ_n X_n conj(K_mn)``. The
transforms are computed as products with constant matrices, whose order of summation turret
determines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from turret.kernels.cpu.row_adapters import spectrum, transform_products, transforms
from turret.kernels.rows import row_product
from turret.lazy_torch import torch
from turret.server.adapters.operators import BaseRows, Operator, ServedWeight


@dataclass(frozen=True)
class Circulant(Operator):
    """Adds a block-circulant update; see the formula above.

    Attributes:
        kernel: ``[out / b, in / b, b]``, serving dtype, contiguous, the scaling folded in.
    """

    name = "circulant"

    kernel: torch.Tensor

    @cached_property
    def spectra(self) -> torch.Tensor:
        """The kernels' transforms, ``[out / b, in / b, 2, frequencies]`` fp32."""
        return spectrum(self.kernel)

    def prepare(self) -> None:
        _ = self.spectra

    @property
    def prepared_bytes(self) -> int:
        rows, columns, size = self.kernel.shape
        return 8 * rows * columns * (size // 2 + 1)

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        size, spectra = self.kernel.shape[2], self.spectra
        forward, inverse = transforms(size)
        blocks = x.float().unflatten(1, (-1, size)).contiguous()
        found = row_product(blocks, forward.flatten(0, 1).to(x.device))
        found = found.unflatten(2, (2, -1))  # shape [rows, n, 2, f]
        real = x.new_zeros(len(x), spectra.shape[0], spectra.shape[3], dtype=torch.float32)
        imaginary = torch.zeros_like(real)
        for n in range(spectra.shape[1]):
            x_real, x_imaginary = found[:, n, :1], found[:, n, 1:]
            k_real, k_imaginary = spectra[:, n, 0], spectra[:, n, 1]
            real += x_real * k_real + x_imaginary * k_imaginary
            imaginary += x_imaginary * k_real - x_real * k_imaginary
        both = torch.cat((real, imaginary), dim=2)
        y += row_product(both, inverse.flatten(1).to(x.device)).flatten(1).mul_(weight)

    def add_dense(self, total: torch.Tensor, served: ServedWeight, weight: float) -> None:
        kernel = self.kernel.float()
        places = torch.arange(kernel.shape[2])
        differences = (places[None, :] - places[:, None]) % kernel.shape[2]
        matrix = kernel[:, :, differences].permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        total.add_(matrix, alpha=weight)

    @property
    def multiply_adds(self) -> int:
        # Counts both transforms, and four products per frequency for every pair of blocks.
        rows, columns, size = self.kernel.shape
        return (rows + columns) * transform_products(size) + 2 * rows * columns * (size + 2)
