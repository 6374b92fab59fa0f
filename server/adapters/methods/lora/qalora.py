"""QA-LoRA (arXiv 2309.14717, ``use_qalora``): ``Δ(x) = s·B A p``, ``p`` groups of inputs added.

PEFT pools by ``mean · in / g``, ``g`` the group's size: a LoRA whose ``A`` repeats each column
``g`` times, times ``in / g²``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.lora_rules import LORA_RULES
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_rank
from turret.server.adapters.peft_format.lora_checkpoint import (
    LORA_BIAS,
    A,
    B,
    lora_format,
    read_lora,
)
from turret.server.adapters.peft_format.module_checkpoint import Roles
from turret.server.adapters.peft_format.role_shapes import Served, check_divides, check_roles

_GROUP = "qalora_group_size"

QALORA_RULES: Rules = {**LORA_RULES, _GROUP: Used(is_rank)}


def _check(
    name: str,
    roles: Roles,
    module: BaseModule,
    rank: int,
    findings: Findings,
    *,
    config: Mapping[str, Any],
) -> None:
    group = config[_GROUP]
    if not check_divides(name, module.in_features, group, "inputs", findings):
        return
    factors = {f"{role}.weight": roles[role] for role in (A, B)}
    shapes = {
        f"{A}.weight": (rank, Served(module.in_features // group)),
        f"{B}.weight": (Served(module.out_features), rank),
    }
    check_roles(name, factors, shapes, findings)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    check = functools.partial(_check, config=config)
    form = lora_format(config, check, also_required=(_GROUP,))
    found = read_lora(checkpoint, base, max_rank, replace(form, rules=QALORA_RULES))
    group: int = config[_GROUP]
    scalings, operators = {}, {}
    for name, roles in found.modules.items():
        scalings[name] = found.targets.scaling(name)
        pooling = base.modules[name].in_features / group**2
        bias = roles.get(LORA_BIAS)
        # The pooling goes into b with the scaling, so that a is rounded as PEFT rounds it.
        a, b = roles[A].repeat_interleave(group, dim=1), roles[B]
        operators[name] = ModuleOperators(
            fold(a, b, scalings[name] * pooling, base.dtype),
            bias=None if bias is None else bias.to(torch.float32) * scalings[name],
        )
        scalings[name] *= pooling
    return finish(
        checkpoint, base, operators, found=found, scalings=scalings, depends_on_base=False
    )


METHOD = Method(
    "qalora",
    {"LORA"},
    QALORA_RULES,
    lower,
    accepts=lambda config: config.get("use_qalora") is True,
)
