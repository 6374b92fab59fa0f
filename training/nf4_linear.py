"""The frozen NF4 modules of a run on a CPU, and its frozen MXFP4 modules on any device.

bitsandbytes multiplies in the activations' dtype. In bfloat16 that is slow on Intel processors
without AMX: on a Xeon, float32 products ran twice as fast as those of AVX512-BF16. So the weight is
dequantised, for one product at a time, to the dtype that should be fastest on the processor. On AMX
and on AMD processors this has not been measured.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch.autograd.function import once_differentiable

from turret.server.models.weights.nf4 import Nf4Weight


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this processor multiplies activations of a dtype.

    It depends on the processor alone, because a resumed run must compute the same bits.
    """
    has: Any = torch.cpu.get_capabilities()
    is_intel = str(has.get("cpu_name")).startswith("Intel")
    has_fast_bf16 = has.get("amx_bf16") or (has.get("avx512_bf16") and not is_intel)
    return torch.bfloat16 if dtype == torch.bfloat16 and has_fast_bf16 else torch.float32


def _dtype_of_product(x: torch.Tensor) -> torch.dtype:
    return product_dtype(x.dtype) if x.device.type == "cpu" else x.dtype


class _Product(torch.autograd.Function):
    """``W x`` for every row. Nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: FrozenNf4Linear) -> torch.Tensor:
        ctx.linear, dtype = linear, _dtype_of_product(x)
        return (x.to(dtype) @ linear.dequantize(dtype).T).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor):  # type: ignore[override]
        (grad,), dtype = grads, _dtype_of_product(grads[0])
        return (grad.to(dtype) @ ctx.linear.dequantize(dtype)).to(grad.dtype), None


class FrozenNf4Linear(Linear4bit):
    """A ``Linear4bit`` that dequantises its weight for each product; see ``freeze``."""

    @classmethod
    def freeze(cls, module: Linear4bit) -> None:
        """Make a loaded module one of these, and undo the nested quantisation of its maxima.

        Undoing it takes 0.05 bytes per weight, and saves doing it in every product.
        """
        module.__class__ = cls
        weight: Any = module.weight
        state = weight.quant_state
        state.absmax = Nf4Weight(weight.data, state).absmax()
        state.nested, state.offset, state.state2 = False, None, None

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, ``[out, in]``."""
        weight: Any = self.weight
        return Nf4Weight(weight.data, weight.quant_state).dequantize(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``W x``."""
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)
