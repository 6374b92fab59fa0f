"""BEFT (arXiv 2509.15974): ``y = W x + b + β``; only ``β`` is trained."""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

METHOD = LinearMethod(
    name="beft",
    peft_types={"BEFT"},
    rank=None,
    tensors={"beft_bias": (1, OUT)},
    operators=lambda m: Bias(m.tensors["beft_bias"]),
)
