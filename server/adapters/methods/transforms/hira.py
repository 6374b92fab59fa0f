"""HiRA (ICLR 2025): ``y = (W + W ⊙ B A) x + b``, the weight times a low-rank matrix entry by entry.

``(W ⊙ B A) x = Σ_r b_r ⊙ W (a_r ⊙ x)``: the base multiplies ``r`` more rows for a token, and
nothing as large as the weight is made. There is no scale.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import modulated
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.rules import Rules, Used
from turret.server.adapters.peft_format.config.selection_rules import (
    CONV1D_RULES,
    DROPOUT,
    LAYER_RULES,
    RANK,
    SELECTION_RULES,
    START,
)
from turret.server.adapters.peft_format.config.targets import is_rank_pattern
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_roles

_A, _B = "hira_A", "hira_B"

HIRA_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    "r": RANK,
    "rank_pattern": Used(is_rank_pattern),
    "hira_dropout": DROPOUT,
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
    # PEFT 0.21 reads rank_pattern on a 4-bit base alone: on others every module has the rank r.
    found = roles[_A].shape[0] if _A in roles else rank
    rank = found if found == config["r"] else rank
    shapes = {_A: (rank, Served(module.in_features)), _B: (Served(module.out_features), rank)}
    check_roles(name, roles, shapes, findings)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    form = ModuleFormat(
        rules=HIRA_RULES,
        roles={f".{_A}": _A, f".{_B}": _B},
        check=functools.partial(_check, config=checkpoint.config),
        rank_of=lambda roles, _rank: roles[_A].shape[0],
        has_patterns=True,
    )
    found = read_module_checkpoint(checkpoint, base, form, max_rank)
    operators = {
        name: ModuleOperators(modulated=modulated(roles[_A], roles[_B], base.dtype))
        for name, roles in found.modules.items()
    }
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


METHOD = Method("hira", {"HIRA"}, HIRA_RULES, lower)
