"""KaSA (arXiv 2412.06071, ``kasa_config``): LoRA with a diagonal, on a weight without its noise.

``ΔW = s·B diag(σ) A − W_r``, where ``W_r`` is the part of the weight served that belongs to its
``r`` smallest singular values: a low-rank update of rank ``2 r``. Signs of singular vectors cancel
in ``W_r``, so that it is the same whoever computes it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.updates import LowRank
from turret.server.adapters.peft_format.config.lora_rules import LORA_RULES
from turret.server.adapters.peft_format.lora_checkpoint import (
    DIAGONAL,
    LORA_BIAS,
    A,
    B,
    check_plain_factors,
    lora_format,
    read_lora,
)
from turret.server.adapters.peft_format.module_checkpoint import Roles


def _check(name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings) -> None:
    check_plain_factors(name, roles, module, rank, findings)
    smaller = min(module.in_features, module.out_features)
    if rank >= smaller:
        findings.mismatch(name, f"has {smaller} singular values, no more than the rank {rank}")


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    form = lora_format(checkpoint.config, _check, rank_of=lambda _roles, rank: 2 * rank)
    found = read_lora(checkpoint, base, max_rank, form)
    operators = {}
    with base.beside():
        for name, roles in found.modules.items():
            scaling, bias = found.targets.scaling(name), roles.get(LORA_BIAS)
            operators[name] = ModuleOperators(
                _low_rank(roles, scaling, base.modules[name], base.dtype),
                bias=None if bias is None else bias.to(torch.float32) * scaling,
            )
    return finish(checkpoint, base, operators, found=found)


def _low_rank(roles: Roles, scaling: float, module: BaseModule, dtype: torch.dtype) -> LowRank:
    wide = torch.promote_types(roles[A].dtype, torch.float32)
    a, b, diagonal = (roles[role].to(wide) for role in (A, B, DIAGONAL))
    rank = len(diagonal)
    # PEFT decomposes it in fp32.
    u, s, v = torch.linalg.svd(module.dequantize().to(torch.float32), full_matrices=False)
    noise = (-u[:, -rank:] * s[-rank:]).to(b)
    return fold(
        torch.cat((a, v[-rank:].to(a))),
        torch.cat((b * diagonal * scaling, noise), dim=1),
        1.0,
        dtype,
    )


METHOD = Method(
    "kasa",
    {"LORA"},
    LORA_RULES,
    lower,
    accepts=lambda config: isinstance(config.get("kasa_config"), Mapping),
)
