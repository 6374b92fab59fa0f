"""MiSS (arXiv 2409.15371), once Bone: ``Δ(x) = Mᵀ Σ_j x_j``, pieces of ``r`` inputs added up.

As factors: ``A`` is 0 but for ``A[i mod r, i] = 1``, ``B = Mᵀ``. With ``init_weights: "mini"`` the
file has the first ``mini_r`` columns of ``M``, which repeat. ``"bat"`` multiplies the base's weight
and has no such factors.
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
from turret.server.adapters.operators import ModuleOperators
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_one_of, is_rank
from turret.server.adapters.peft_format.config.selection_rules import (
    DROPOUT,
    LAYER_RULES,
    RANK,
    SELECTION_RULES,
)
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_divides, check_roles
from turret.server.adapters.peft_format.unserved import MERGE

# Tensor of a module and value of ``bias`` for the targeted modules, by ``peft_type``.
_NAMES = {"MISS": ("miss_block", "MiSS_only"), "BONE": ("bone_block", "bone_only")}


def _is_start(value: Any) -> str | None:
    if value == "bat":
        return f"is 'bat', which multiplies blocks of the base's weight and is not served; {MERGE}"
    return None if value == "mini" or isinstance(value, bool) else f"is {value!r:.60}, unknown here"


MISS_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    "bias": Used(is_one_of("none", "all", *(only for _, only in _NAMES.values()))),
    "r": RANK,
    "mini_r": Used(is_rank),
    "init_weights": Used(_is_start),
    "miss_dropout": DROPOUT,
}


def _check(
    name: str,
    roles: Roles,
    module: BaseModule,
    rank: int,
    findings: Findings,
    *,
    config: Mapping[str, Any],
    role: str,
) -> None:
    width: int = Served(module.out_features)
    if config.get("init_weights") == "mini":
        width = config.get("mini_r", 1)
        if not check_divides(name, module.out_features, width, "outputs", findings):
            return
    check_roles(name, roles, {role: (rank, width)}, findings)
    if rank > module.in_features:
        findings.mismatch(name, f"has {module.in_features} inputs, fewer than the rank {rank}")


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    role, only = _NAMES[config["peft_type"].upper()]
    form = ModuleFormat(
        rules=MISS_RULES,
        roles={f".{role}": role},
        check=functools.partial(_check, config=config, role=role),
        bias_only=only,
    )
    found = read_module_checkpoint(checkpoint, base, form, max_rank)
    operators = {}
    for name, roles in found.modules.items():
        block, module = roles[role], base.modules[name]
        b = block.T.repeat(module.out_features // block.shape[1], 1)
        inputs = torch.arange(module.in_features)
        a = torch.zeros(len(block), module.in_features, dtype=base.dtype)
        a[inputs % len(block), inputs] = 1
        operators[name] = ModuleOperators(fold(a, b, 1.0, base.dtype))
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


METHOD = Method("miss", set(_NAMES), MISS_RULES, lower)
