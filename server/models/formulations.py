"""Names for the log of what computes each part of a step on this machine."""

from __future__ import annotations

import torch

from turret.kernels.cpu import native
from turret.kernels.rows.linear import linear_formulation
from turret.kernels.rows.trial import choices
from turret.server.models.decoding.cpu_layer_ops import CpuLayerOps
from turret.server.models.decoding.decoder import Decoder
from turret.server.models.weights.base_linear import BaseLinear
from turret.server.models.weights.nf4 import Nf4Linear


def formulations(decoder: Decoder, *, is_head_screened: bool) -> dict[str, str]:
    """Part → ``native``, or ``torch`` and in which calls it keeps a row's bits; empty off the CPU.

    Args:
        decoder: What computes.
        is_head_screened: Whether greedy tokens are told from a copy of the head.

    ``isa`` is the instruction set that native kernels are compiled for. What has not been used or
    tried yet says ``torch`` alone.
    """
    if decoder.device.type != "cpu":
        return {}
    found = {} if native.isa() is None else {"isa": str(native.isa())}
    attention = "torch" if native.isa() is None else "native products, torch"
    if isinstance(decoder.ops, CpuLayerOps):
        attention = "native"
    elif "matrices" in choices():
        attention = f"torch {choices()['matrices']}"
    adapters = "native" if native.has_native(decoder.dtype, decoder.device) else "native products"
    screened = ", screened in int8" if is_head_screened else ""
    return found | {
        "products": _product(decoder.layers[0].qkv.base),
        "head": linear_formulation(decoder.head) + screened,
        "adapters": adapters if native.isa() is not None else "torch",
        "attention": attention,
    }


def _product(base: BaseLinear) -> str:
    if not isinstance(base, Nf4Linear):
        return "native" if native.has_kernels(torch.device("cpu")) else "torch"
    return base.formulation()
