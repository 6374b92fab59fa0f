"""DoRA (arXiv 2402.09353): ``y = g ⊙ (W x + s·B A x) + b`` with ``g = m / ‖W + s·B A‖_row``.

As operators: gain ``g`` on the bias-free base result, and a low-rank update whose ``B`` is scaled
by ``s·g``. ``W`` is the weight actually served, so the norms belong to this base and are computed
at load, never taken from elsewhere.
"""

from __future__ import annotations

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.lora_rules import LORA_RULES
from turret.server.adapters.peft_format.dora_gain import dora_gain
from turret.server.adapters.peft_format.lora_checkpoint import MAGNITUDE, A, B, read_lora


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    found = read_lora(checkpoint, base, max_rank)
    scalings = {name: found.targets.scaling(name) for name in found.modules}
    operators = {}
    with base.beside():
        for name, roles in found.modules.items():
            a, b, scaling = roles[A], roles[B], scalings[name]
            # One dequantised weight at a time: it is dropped before the next is made.
            gain = dora_gain(roles[MAGNITUDE], a, b, scaling, base.modules[name].rows())
            operators[name] = ModuleOperators(fold(a, b, scaling, base.dtype, gain), gain=gain)
    return finish(checkpoint, base, operators, found=found, scalings=scalings)


METHOD = Method(
    "dora", {"LORA"}, LORA_RULES, lower, accepts=lambda config: config.get("use_dora") is True
)
