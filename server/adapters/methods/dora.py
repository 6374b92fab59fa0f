"""DoRA (arXiv 2402.09353): ``y = g ⊙ (W x + s·B A x) + b`` with ``g = m / ‖W + s·B A‖_row``.

The operators are a gain ``g`` on the bias-free base result, and a low-rank update whose ``B`` is
scaled by ``s·g``. ``W`` is the weight as served. The norms depend on ``W``, so they are always
computed at load.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.lora import MAGNITUDE, A, B, start
from turret.server.adapters.methods.lora import METHOD as LORA
from turret.server.adapters.peft_format.reading import dora_gain


def _operators(m: Module) -> list[Piece]:
    a, b = m.tensors[A], m.tensors[B]
    # Only one dequantised weight is in memory: it is freed before the next one is computed.
    own = dora_gain(m.tensors[MAGNITUDE], a, b, m.scaling, m.rows())
    (wide,) = m.wide(B)
    return [low_rank(a, wide * m.scaling * own[:, None]), Gain(own)]


def _start(m: NewModule) -> dict[str, torch.Tensor]:
    return {**start(m), MAGNITUDE: m.norms()}


METHOD = replace(
    LORA,
    name="dora",
    accepts=lambda config: config.get("use_dora") is True,
    operators=_operators,
    start=Start(_start, lambda rank, targets: {"use_rslora": False, "use_dora": True}),
)
