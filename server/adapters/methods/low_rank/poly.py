"""Poly (arXiv 2202.13914): ``Δ(x) = x A_t B_t / r``, a task's mix of the factors of skills.

``A_t = Σ_s w_ts A_s`` split by split, ``w_t = σ(l_t) / Σ σ(l_t)`` over the skills of a split. An
adapter is one task of its files.
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
from turret.server.adapters.operators.updates import LowRank
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_one_of, is_rank
from turret.server.adapters.peft_format.config.selection_rules import RANK, SELECTION_RULES, START
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_divides, check_roles
from turret.server.adapters.peft_format.tasks import check_task, task_warning

_A, _B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
_COUNTS = ("n_tasks", "n_skills", "n_splits")
# PEFT adds it to the sum that it divides by.
_EPSILON = 1e-12

POLY_RULES: Rules = {
    **SELECTION_RULES,
    "r": RANK,
    **dict.fromkeys(_COUNTS, Used(is_rank)),
    "poly_type": Used(is_one_of("poly")),
    "init_weights": START,
}


def _check(
    name: str,
    roles: Roles,
    module: BaseModule,
    rank: int,
    findings: Findings,
    *,
    config: Mapping[str, Any],
) -> None:
    tasks, skills, splits = (config[key] for key in _COUNTS)
    sizes = ((module.in_features, "inputs"), (module.out_features, "outputs"))
    divides = [check_divides(name, size, splits, what, findings) for size, what in sizes]
    if all(divides):
        shapes = {
            _A: (splits, skills, Served(module.in_features // splits), rank),
            _B: (splits, skills, rank, Served(module.out_features // splits)),
            _LOGITS: (tasks, splits * skills),
        }
        check_roles(name, roles, shapes, findings)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    form = ModuleFormat(
        rules=POLY_RULES,
        roles={f".{role}": role for role in (_A, _B, _LOGITS)},
        check=functools.partial(_check, config=config),
        also_required=_COUNTS,
    )
    found = read_module_checkpoint(checkpoint, base, form, max_rank)
    findings = Findings(checkpoint.path, base.name)
    task = check_task(checkpoint, "n_tasks", findings)
    findings.raise_if_any()
    operators = {
        name: ModuleOperators(_low_rank(roles, task, base.dtype))
        for name, roles in found.modules.items()
    }
    warnings = task_warning(task, config["n_tasks"])
    return finish(
        checkpoint, base, operators, found=found, warnings=warnings, depends_on_base=False
    )


def _low_rank(roles: Roles, task: int, dtype: torch.dtype) -> LowRank:
    wide = torch.promote_types(roles[_A].dtype, torch.float32)
    a, b, logits = (roles[role].to(wide) for role in (_A, _B, _LOGITS))
    splits, skills, _, rank = a.shape
    weights = logits[task].view(splits, skills).sigmoid()
    weights = weights / (weights.sum(-1, keepdim=True) + _EPSILON)
    a = torch.einsum("qs,qsdr->qdr", weights, a).reshape(-1, rank)
    b = torch.einsum("qs,qsrd->qrd", weights, b).transpose(0, 1).reshape(rank, -1)
    return fold(a.T, b.T, 1.0 / rank, dtype)


METHOD = Method("poly", {"POLY"}, POLY_RULES, lower, has_tasks=True)
