"""DeLoRA (arXiv 2503.18225): ``Δ(x) = B diag(λ / (r ‖a_i‖ ‖b_i‖)) A (n ⊙ x)``.

Direction and strength are apart: ``λ`` bounds the update, ``n``, in the file, are the norms of the
columns of the weight it was trained on.
"""

from __future__ import annotations

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.updates import LowRank
from turret.server.adapters.peft_format.config.rules import Irrelevant, Rules
from turret.server.adapters.peft_format.config.selection_rules import (
    DROPOUT,
    LAYER_RULES,
    PATTERN_RULES,
    RANK,
    SELECTION_RULES,
    START,
    bias_rules,
)
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_roles

_A, _B, _LAMBDA, _NORMS = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
# PEFT clamps norms there.
_MIN_NORM = 1e-4

DELORA_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **bias_rules("delora_only"),
    "r": RANK,
    "rank_pattern": PATTERN_RULES["rank_pattern"],
    "delora_lambda": Irrelevant("the tensors hold what training made of it"),
    "lambda_pattern": Irrelevant("the tensors hold what training made of it"),
    "module_dropout": DROPOUT,
    "init_weights": START,
}


def _check(name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings) -> None:
    shapes = {
        _A: (rank, Served(module.in_features)),
        _B: (Served(module.out_features), rank),
        _LAMBDA: (1,),
        _NORMS: (Served(module.in_features),),
    }
    check_roles(name, roles, shapes, findings)


_FORMAT = ModuleFormat(
    rules=DELORA_RULES,
    roles={f".{role}": role for role in (_A, _B, _LAMBDA, _NORMS)},
    check=_check,
    has_patterns=True,
    bias_only="delora_only",
)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    operators = {
        name: ModuleOperators(_low_rank(roles, base.dtype)) for name, roles in found.modules.items()
    }
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


def _low_rank(roles: Roles, dtype: torch.dtype) -> LowRank:
    wide = torch.promote_types(roles[_A].dtype, torch.float32)
    a, b, strength, norms = (roles[role].to(wide) for role in (_A, _B, _LAMBDA, _NORMS))
    lengths = a.norm(dim=1).clamp(min=_MIN_NORM) * b.norm(dim=0).clamp(min=_MIN_NORM)
    return fold(a * norms, b * (strength / len(a) / lengths), 1.0, dtype)


METHOD = Method("delora", {"DELORA"}, DELORA_RULES, lower)
