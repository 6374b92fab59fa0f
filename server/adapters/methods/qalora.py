"""QA-LoRA (arXiv 2309.14717, ``use_qalora``): ``Δ(x) = s·B A p``; ``p`` pools groups of inputs.

PEFT pools a group of ``g`` inputs to their mean times ``in / g``. This equals a LoRA whose ``A``
repeats each column ``g`` times, scaled by ``in / g²``.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.lora import METHOD as LORA
from turret.server.adapters.methods.lora import A, B, with_bias

_GROUP = "qalora_group_size"


def _operators(m: Module) -> Iterator[Piece]:
    group = m.config[_GROUP]
    # Fold the pooling into b with the scaling, so that a is rounded as PEFT rounds it.
    a = m.tensors[A].repeat_interleave(group, dim=1)
    return with_bias(m, Scaled(a, m.tensors[B], m.scaling * (m.inputs / group**2)))


METHOD = replace(
    LORA,
    name="qalora",
    accepts=lambda config: config.get("use_qalora") is True,
    keys={**LORA.keys, _GROUP: fault_of_rank},
    ignored=without(LORA.ignored, _GROUP),
    required=(_GROUP,),
    factors=None,
    tensors={**LORA.tensors, A: (R, IN / key(_GROUP))},
    operators=_operators,
)
