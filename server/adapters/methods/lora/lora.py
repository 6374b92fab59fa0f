"""LoRA (arXiv 2106.09685) and rsLoRA (arXiv 2312.03732): ``Δ(x) = s·B A x``.

``s`` is alpha/r, or alpha/√r for rsLoRA, with each module's own r and alpha. A bias inside
``lora_B`` is scaled with it; biases that PEFT saved whole become differences to the base's. VeLoRA
and MonteCLoRA are LoRA at inference: what they add is for training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import Factors, fold_all
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.lora_rules import (
    ARROW,
    INVOCATION,
    LORA_RULES,
)
from turret.server.adapters.peft_format.lora_checkpoint import LORA_BIAS, A, B, read_lora
from turret.server.adapters.peft_format.module_checkpoint import ModuleCheckpoint, Roles


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    return lower_factors(checkpoint, base, read_lora(checkpoint, base, max_rank))


def lower_factors(
    checkpoint: AdapterCheckpoint, base: BaseModel, found: ModuleCheckpoint
) -> Lowered:
    """Makes operators of factors that were read, and of biases inside ``lora_B``."""
    scalings = {name: found.targets.scaling(name) for name in found.modules}
    factors = {
        name: Factors(roles[A], roles[B], scalings[name]) for name, roles in found.modules.items()
    }
    operators = {
        name: ModuleOperators(low_rank, bias=_scaled(found.modules[name], scalings[name]))
        for name, low_rank in fold_all(factors, base.dtype).items()
    }
    return finish(
        checkpoint, base, operators, found=found, scalings=scalings, depends_on_base=False
    )


def _scaled(roles: Roles, scaling: float) -> torch.Tensor | None:
    """The bias inside ``lora_B``, if there is one."""
    bias = roles.get(LORA_BIAS)
    return None if bias is None else bias.to(torch.float32) * scaling


def _is_plain(config: Mapping[str, Any]) -> bool:
    """Whether no other method is meant; values at fault are reported here."""
    flags = any(config.get(key) is True for key in ("use_dora", "use_qalora"))
    flags = flags or isinstance(config.get(INVOCATION), list)
    return not flags and not any(
        isinstance(config.get(key), Mapping) for key in ("use_bdlora", "kasa_config", ARROW)
    )


METHOD = Method("lora", {"LORA"}, LORA_RULES, lower, accepts=_is_plain)
