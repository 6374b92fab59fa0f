"""``y = x Wᵀ`` for a wide bf16 weight and the few rows of a step."""

from __future__ import annotations

import torch

from turret.kernels.cpu.native import functions, has_native_products
from turret.kernels.cpu.threads import num_threads

_GROUP = 16  # rows of a tile


def serves_dense(weight: torch.Tensor) -> bool:
    """Whether ``dense_product`` supports a weight."""
    is_bf16 = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return is_bf16 and has_native_products()


def dense_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply rows by a weight that is read as it lies; only where ``serves_dense``.

    Args:
        x: ``[rows, in]`` bf16.
        weight: ``[out, in]`` bf16, contiguous.

    Returns:
        ``[rows, out]`` bf16, summed in fp32; a row's bits are the same in any batch.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)
    scratch = torch.empty(-(-x.shape[0] // _GROUP) * _GROUP, x.shape[1], dtype=torch.bfloat16)
    functions().turret_dense_product(
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        weight.data_ptr(),
        y.data_ptr(),
        *weight.shape,
        num_threads(),
        scratch.data_ptr(),
    )
    return y
