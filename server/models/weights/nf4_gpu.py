"""The base projection on the gpu path: NF4 weights on the device, multiplied in two ways.

Rows of decoding sequences and of short prompts go through ``nf4_matmul``. Rows of longer prompts go
through a dequantised copy of the weight and a library's product. The path of a row and the shape of
its product depend only on its own sequence, so its bits do not depend on the rest of the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from turret.kernels.cpu.row_adapters import Ahead
from turret.kernels.gpu.common import tuning
from turret.kernels.gpu.low_rank import Shrink, nf4_shrink
from turret.kernels.gpu.nf4 import Epilogue, nf4_dequantize, nf4_matmul
from turret.kernels.nf4_matmul import BLOCK, Nf4Matrix
from turret.kernels.rows import linear_in_pieces, transposed_in_pieces
from turret.server.adapters.base import WeightRows
from turret.server.models.weights import BaseLinear

if TYPE_CHECKING:
    from turret.server.models.weights.nf4 import Nf4Weight

# Library products. A row must get the same bits at every position in a product. Rows go to the
# library in pieces of one shape, so it always uses the same algorithm. But a reduction that is
# split among programs (split-K) may depend on the row's position, and may add its parts in the
# dtype of activations. ``keep_sums_whole`` switches both off.
# ``tests/models/weights/test_library_products.py`` permutes rows on a GPU.

# Rows and columns of a trial product. torch rejects products whose sums it cannot keep whole.
_TRIAL = 64


def keep_sums_whole(device: torch.device) -> bool:
    """Set torch up, for the whole process, so that no product splits a sum.

    Call this before the first product and before anything is captured.

    Args:
        device: The device of the products. Only CUDA devices need settings.

    Returns:
        Whether sums are never split. If False, this version of torch lacks the setting, and parts
        are summed in fp32.
    """
    if device.type != "cuda":
        return True
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    with warnings.catch_warnings(action="ignore"):
        # torch warns that this setting is experimental.
        torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        matmul.allow_bf16_reduced_precision_reduction = (False, False)
        matmul.allow_fp16_reduced_precision_reduction = (False, False)
        for dtype in (torch.bfloat16, torch.float16):
            trial = torch.zeros(_TRIAL, _TRIAL, dtype=dtype, device=device)
            F.linear(trial, trial)
    except (RuntimeError, TypeError):
        matmul.allow_bf16_reduced_precision_reduction = False
        matmul.allow_fp16_reduced_precision_reduction = False
        return False
    return True


# Libraries choose their algorithm by shape, so prompts are multiplied in pieces of one shape.
PROMPT_ROWS = 256


class Nf4Product:
    """``x Wᵀ`` for a fused weight.

    Args:
        weight: The quantised weight, with every tensor on the device; or the dense weight,
            ``[out_features, in_features]``.
        dtype: The dtype of activations.
    """

    def __init__(self, weight: Nf4Matrix | torch.Tensor, dtype: torch.dtype) -> None:
        self._dtype = dtype
        # No kernel reads a quantisation block that spans rows.
        if isinstance(weight, Nf4Matrix) and weight.in_features % BLOCK:
            weight = weight.dequantize(dtype)
        self._weight = weight

    def __call__(self, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        """Multiply rows by the weight.

        Args:
            x: ``[rows, in_features]``, the rows of decoding sequences and short prompts first.
            num_decode: The number of these first rows.

        Returns:
            ``[rows, out_features]``, dtype of ``x``.
        """
        return self._multiply(x, num_decode, None)[0]

    def with_shrink(
        self, x: torch.Tensor, num_decode: int, shrink: Shrink
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The product, and the rank activations of all rows, if possible from the same launch.

        Both have the bits of their separate kernels.
        """
        y, v = self._multiply(x, num_decode, shrink)
        return y, shrink(x) if v is None else v

    def _multiply(
        self, x: torch.Tensor, num_decode: int, shrink: Shrink | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, step = self._weight, tuning(x.device).nf4_pass_rows
        parts: list[torch.Tensor] = []
        v: torch.Tensor | None = None
        if isinstance(weight, Nf4Matrix) and step:
            for start in range(0, num_decode, step):
                end = min(start + step, num_decode)
                if start == 0 and shrink is not None:
                    y, v = nf4_shrink(x, end, weight, shrink)
                    parts.append(y)
                else:
                    parts.append(nf4_matmul(x[start:end], weight))
        else:
            num_decode = 0
        if num_decode < x.shape[0]:
            weight = self.dequantize(x.dtype)
            parts.append(linear_in_pieces(x[num_decode:], weight, PROMPT_ROWS))
        return parts[0] if len(parts) == 1 else torch.cat(parts), v

    def with_epilogue(
        self, x: torch.Tensor, epilogue: Epilogue, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The epilogue's result for decoding rows; None if no kernel fuses it with the product."""
        weight, step = self._weight, tuning(x.device).nf4_pass_rows
        if not (isinstance(weight, Nf4Matrix) and step and epilogue.ends_product(bias, x.device)):
            return None
        parts = [
            epilogue.of_product(x[start : start + step], start, weight, bias)
            for start in range(0, x.shape[0], step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, ``[out_features, in_features]``, as it is multiplied."""
        weight = self._weight
        return nf4_dequantize(weight, dtype) if isinstance(weight, Nf4Matrix) else weight

    def part(self, rows: slice) -> Nf4Product:
        """The product for a part of the outputs, sharing the memory of the whole weight."""
        weight = self._weight
        part = weight.part(rows) if isinstance(weight, Nf4Matrix) else weight[rows]
        return Nf4Product(part, self._dtype)

    @staticmethod
    def join(parts: Sequence[Nf4Product]) -> Nf4Product:
        """Fuse products of one input, in this order; copies their weights."""
        first, weights = parts[0], [part._weight for part in parts]
        dense = [weight for weight in weights if isinstance(weight, torch.Tensor)]
        if dense:
            return Nf4Product(torch.cat(dense), first._dtype)
        packed = [w for w in weights if isinstance(w, Nf4Matrix)]
        matrix = Nf4Matrix(
            torch.cat([w.packed for w in packed]),
            torch.cat([w.absmax for w in packed]),
            sum(w.out_features for w in packed),
            packed[0].in_features,
        )
        return Nf4Product(matrix, first._dtype)


class GpuLinear(BaseLinear):
    """NF4 weights on the device, or the part of their rows that ``served`` returns.

    Args:
        product: The fused weight.
        widths: Outputs of each slice.
        in_features: Inputs.
        dtype: The dtype of activations.
        device: Where the weight is.
    """

    def __init__(
        self,
        product: Nf4Product,
        widths: tuple[int, ...],
        in_features: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.product, self.widths, self.in_features = product, widths, in_features
        self.dtype, self.device = dtype, device

    @classmethod
    def fuse(
        cls, slices: Sequence[Nf4Weight], dtype: torch.dtype, device: torch.device
    ) -> GpuLinear:
        """Fuse weights that share their input."""
        widths, in_features = tuple(weight.shape[0] for weight in slices), slices[0].shape[1]
        packed = torch.cat([weight.packed.view(-1) for weight in slices]).to(device)
        absmax = torch.cat([weight.absmax() for weight in slices]).to(device)
        product = Nf4Product(Nf4Matrix(packed, absmax, sum(widths), in_features), dtype)
        return cls(product, widths, in_features, dtype, device)

    def __call__(
        self, x: torch.Tensor, ahead: Ahead | None = None, num_decode: int | None = None
    ) -> torch.Tensor:
        return self.product(x, num_decode or 0)

    @property
    def shape(self) -> tuple[int, int]:
        """``(outputs, inputs)``."""
        return sum(self.widths), self.in_features

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Some rows of the weight as multiplied, on the device."""
        some = slice(rows.start, min(rows.stop, self.shape[0]))
        return self.product.part(some).dequantize(self.dtype)

    def served(self, index: int) -> WeightRows:
        return self.part(index)

    def dequantize(self, index: int) -> torch.Tensor:
        return self.product.part(self._rows(index)).dequantize(self.dtype).float().cpu()

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        return transposed_in_pieces(grad, self.product.dequantize(self.dtype), PROMPT_ROWS)

    def part(self, index: int) -> GpuLinear:
        product = self.product.part(self._rows(index))
        return GpuLinear(product, (self.widths[index],), self.in_features, self.dtype, self.device)

    @classmethod
    def join(cls, parts: Sequence[GpuLinear]) -> GpuLinear:
        """Fuse projections, in this order; copies their weights."""
        first, widths = parts[0], tuple(width for part in parts for width in part.widths)
        product = Nf4Product.join([part.product for part in parts])
        return cls(product, widths, first.in_features, first.dtype, first.device)
