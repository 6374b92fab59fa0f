"""DoRA (arXiv 2402.09353): ``y = g ⊙ (W x + s·B A x) + b`` with ``g = m / ‖W + s·B A‖_row``.

As operators: gain ``g`` on the bias-free base result, and a low-rank update whose ``B`` is scaled
by ``s·g``. ``W`` is the weight actually served, so the norms belong to this base and are computed
at load, never taken from elsewhere.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.lora.lora import MAGNITUDE, A, B, start
from turret.server.adapters.methods.lora.lora import METHOD as LORA
from turret.server.adapters.peft_format.reading import dora_gain


def _operators(m: Module) -> list[Piece]:
    a, b = m.tensors[A], m.tensors[B]
    # At most one dequantised weight is held: it is freed before the next module's is made.
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
