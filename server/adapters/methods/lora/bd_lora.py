"""BD-LoRA (``use_bdlora``): LoRA with one factor block-diagonal, for shards without sums.

The file holds the blocks side by side: ``lora_A`` ``[r, in / n]`` or ``lora_B`` ``[out, r / n]``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
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
from turret.server.adapters.peft_format.lora_checkpoint import (
    LORA_BIAS,
    A,
    B,
    lora_format,
    read_lora,
)
from turret.server.adapters.peft_format.module_checkpoint import Roles
from turret.server.adapters.peft_format.role_shapes import Served, check_divides, check_roles

_LISTS = {A: "target_modules_bd_a", B: "target_modules_bd_b"}


def _blocked(name: str, config: Mapping[str, Any]) -> list[str]:
    """Which factors of a module the config makes block-diagonal."""
    return [
        role
        for role, key in _LISTS.items()
        if any(part in name for part in config["use_bdlora"].get(key) or ())
    ]


def _check(
    name: str,
    roles: Roles,
    module: BaseModule,
    rank: int,
    findings: Findings,
    *,
    config: Mapping[str, Any],
) -> None:
    blocks, blocked = config["use_bdlora"]["nblocks"], _blocked(name, config)
    if len(blocked) > 1:
        findings.add("use_bdlora", f"makes both factors of {name!r:.120} block-diagonal")
        return
    inputs, outputs, columns = Served(module.in_features), Served(module.out_features), rank
    if blocked:
        size, what = (module.in_features, "inputs") if A in blocked else (outputs, "outputs")
        if rank % blocks:
            findings.add("use_bdlora", f"nblocks, {blocks}, does not divide rank {rank}")
            return
        if not check_divides(name, size, blocks, what, findings):
            return
        inputs = Served(inputs // blocks) if A in blocked else inputs
        columns = rank // blocks if B in blocked else rank
    factors = {f"{role}.weight": roles[role] for role in (A, B)}
    shapes = {f"{A}.weight": (rank, inputs), f"{B}.weight": (outputs, columns)}
    check_roles(name, factors, shapes, findings)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    check = functools.partial(_check, config=config)
    form = lora_format(config, check, also_required=("use_bdlora",))
    found = read_lora(checkpoint, base, max_rank, form)
    scalings = {name: found.targets.scaling(name) for name in found.modules}
    operators = {}
    for name, roles in found.modules.items():
        factors = {role: roles[role] for role in (A, B)}
        for role in _blocked(name, config):
            blocks = factors[role].chunk(config["use_bdlora"]["nblocks"])
            factors[role] = torch.block_diag(*blocks)
        bias = roles.get(LORA_BIAS)
        operators[name] = ModuleOperators(
            fold(factors[A], factors[B], scalings[name], base.dtype),
            bias=None if bias is None else bias.to(torch.float32) * scalings[name],
        )
    return finish(
        checkpoint, base, operators, found=found, scalings=scalings, depends_on_base=False
    )


METHOD = Method(
    "bd_lora",
    {"LORA"},
    LORA_RULES,
    lower,
    accepts=lambda config: isinstance(config.get("use_bdlora"), Mapping),
)
