"""BEFT (arXiv 2509.15974): ``y = W x + b + β``; only ``β`` is trained."""

from __future__ import annotations

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.rules import Rules
from turret.server.adapters.peft_format.config.selection_rules import START, TARGET_RULES
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_roles

_BETA = "beft_bias"

BEFT_RULES: Rules = {**TARGET_RULES, "init_weights": START}


def _check(name: str, roles: Roles, module: BaseModule, _rank: int, findings: Findings) -> None:
    check_roles(name, roles, {_BETA: (1, Served(module.out_features))}, findings)


_FORMAT = ModuleFormat(rules=BEFT_RULES, roles={f".{_BETA}": _BETA}, check=_check, rank_key=None)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    operators = {
        name: ModuleOperators(bias=roles[_BETA].reshape(-1).to(torch.float32))
        for name, roles in found.modules.items()
    }
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


METHOD = Method("beft", {"BEFT"}, BEFT_RULES, lower)
