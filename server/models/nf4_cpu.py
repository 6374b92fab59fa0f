"""bitsandbytes' fused NF4 product on the CPU, called without its Python layers.

The registered torch op spends about 10 µs a call in Python (measured: 15.3 against 5.7 µs for one
row of 576 → 576), 1.2 ms of a SmolLM2 step. The library's function is called directly where it is
there; the op is the fallback, and a test holds the two equal.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

_FUNCTION = "gemv_4bit_inference_cpu_nf4_bf16"


@functools.cache
def native_product() -> Callable[..., None] | None:
    """The library's function, or None if this build of bitsandbytes lacks it."""
    from bitsandbytes.cextension import lib

    inner: Any = getattr(lib, "_lib", None)
    path = getattr(inner, "_name", None)
    if path is None:
        return None
    # A handle of its own: declaring argument types must not change bitsandbytes' calls.
    function = getattr(ctypes.CDLL(path), _FUNCTION, None)
    if function is not None:
        function.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
        function.restype = None
    return function


def nf4_product(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    shape: tuple[int, int],
    blocksize: int,
) -> torch.Tensor:
    """Multiply rows by a weight in bitsandbytes' packed CPU layout.

    Args:
        x: ``[rows, in]`` bf16.
        packed: ``[out, in / 2]`` uint8.
        absmax: ``[in / blocksize, out]`` bf16.
        code: The 16 NF4 values, fp32.
        shape: ``(out, in)``.
        blocksize: Weights per absmax.

    Returns:
        ``[rows, out]`` bf16.
    """
    if x.stride(1) != 1:
        # The library walks a row with stride 1, and the op hands any tensor to it unchecked.
        x = x.contiguous()
    function = native_product()
    if function is None:
        return torch.ops.bitsandbytes.gemv_4bit(x, packed, shape, absmax, code, blocksize)
    rows, (out_features, in_features) = x.shape[0], shape
    out = torch.empty(rows, out_features, dtype=torch.bfloat16)
    function(
        rows,
        out_features,
        in_features,
        x.data_ptr(),
        packed.data_ptr(),
        absmax.data_ptr(),
        out.data_ptr(),
        blocksize,
        x.stride(0),
        out_features,
    )
    return out
