"""The fused NF4 product on the CPU: the compiled kernel, or bitsandbytes' with the same bits."""

from __future__ import annotations

import torch

from turret.kernels.cpu.native import functions, has_native_products
from turret.kernels.cpu.row_adapters import Ahead

_BLOCKSIZE = 64


def nf4_product(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    shape: tuple[int, int],
    ahead: Ahead | None = None,
) -> torch.Tensor:
    """Multiply rows by a weight in bitsandbytes' packed CPU layout.

    Args:
        x: ``[rows, in]`` bf16.
        packed: ``[out, in / 2]`` uint8.
        absmax: ``[in / 64, out]`` bf16.
        code: The 16 NF4 values, fp32.
        shape: ``(out, in)``.
        ahead: What to bring into the cache meanwhile.

    Returns:
        ``[rows, out]`` bf16.
    """
    if x.stride(1) != 1:
        # Rows are walked with stride 1, and bitsandbytes takes any tensor unchecked.
        x = x.contiguous()
    if not has_native_products():
        return torch.ops.bitsandbytes.gemv_4bit(x, packed, shape, absmax, code, _BLOCKSIZE)
    rows, (out_features, in_features) = x.shape[0], shape
    out = torch.empty(rows, out_features, dtype=torch.bfloat16)
    step, module = ahead or (None, 0)
    functions().turret_nf4_product(
        x.data_ptr(),
        x.stride(0),
        rows,
        packed.data_ptr(),
        absmax.data_ptr(),
        out.data_ptr(),
        out_features,
        in_features,
        torch.get_num_threads(),
        step,
        module,
    )
    return out
