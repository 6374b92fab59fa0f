"""The NF4 linear modules of a run on a CPU, and those in MXFP4, with or without a LoRA on them.

bitsandbytes multiplies in the activations' dtype. In bfloat16 that is slow on Intel processors
without AMX: on a Xeon, float32 products ran twice as fast as those of AVX512-BF16. So the weight is
dequantised, for one product at a time, to the dtype that should be fastest on the processor. On AMX
and on AMD processors this has not been measured.

A LoRA is computed together with its base product: the sum is rounded once, and the activations are
kept in their own dtype for the backward pass, whereas PEFT keeps a float32 copy for each module.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
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
    """``W x + scaling · B A x`` for every row; without a LoRA, ``a`` and ``b`` are None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        linear: FrozenNf4Linear,
        scaling: float,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
    ) -> torch.Tensor:
        dtype = _dtype_of_product(x)
        rows = x.flatten(0, -2)
        y = rows.to(dtype) @ linear.dequantize(dtype).T
        ctx.linear, ctx.scaling = linear, scaling
        if a is not None and b is not None:
            shrunk = (rows.to(a.dtype) @ a.T).mul_(scaling)
            y = y.to(a.dtype).addmm_(shrunk, b.T)
            ctx.save_for_backward(x, a, b, shrunk)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor):  # type: ignore[override]
        grad = grads[0].flatten(0, -2)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            dtype = _dtype_of_product(grad)
            grad_x = grad.to(dtype) @ ctx.linear.dequantize(dtype)
        # Read the attribute once: activations that are computed twice can be read only once.
        saved = ctx.saved_tensors
        if saved:
            x, a, b, shrunk = saved
            wide = grad.to(a.dtype)
            grad_b = wide.T @ shrunk
            grad_shrunk = (wide @ b).mul_(ctx.scaling)
            grad_a = grad_shrunk.T @ x.flatten(0, -2).to(a.dtype)
            if grad_x is not None:
                grad_x = grad_x.to(a.dtype).addmm_(grad_shrunk, a)
        if grad_x is not None:
            grad_x = grad_x.to(grad.dtype).view(*grads[0].shape[:-1], -1)
        return grad_x, None, None, grad_a, grad_b


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

    def forward(
        self,
        x: torch.Tensor,
        scaling: float = 1.0,
        a: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``W x``, plus a LoRA's change where its factors are passed."""
        y = _Product.apply(x, self, scaling, a, b)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class LoraOnNf4(LoraLinear4bit):
    """PEFT's LoRA layer on a ``FrozenNf4Linear``, computed in one product."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        (name,) = self.active_adapters
        is_plain = isinstance(self.lora_dropout[name], torch.nn.Identity) or not self.training
        if self.disable_adapters or self.lora_variant or not is_plain:
            return super().forward(x, *args, **kwargs)
        factors = self.lora_A[name].weight, self.lora_B[name].weight
        return self.base_layer(x, self.scaling[name], *factors)


def join_loras(model: torch.nn.Module) -> None:
    """Make a model's LoRA layers on ``FrozenNf4Linear`` compute in one product."""
    for layer in model.modules():
        if type(layer) is LoraLinear4bit and isinstance(layer.base_layer, FrozenNf4Linear):
            layer.__class__ = LoraOnNf4
