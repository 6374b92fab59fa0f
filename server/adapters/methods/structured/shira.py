"""SHiRA (arXiv 2406.13175): ``ΔW[i, j] = v`` at a few places, which the file names."""

from __future__ import annotations

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.lowering.sparse import check_width, sparse_of
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.rules import Irrelevant, Rules
from turret.server.adapters.peft_format.config.selection_rules import (
    CONV1D_RULES,
    RANK,
    START,
    TARGET_RULES,
)
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_roles

_VALUES, _PLACES = "shira_weight", "shira_indices"
_DRAWN = "the file holds the places that it drew"

SHIRA_RULES: Rules = {
    **TARGET_RULES,
    **CONV1D_RULES,
    "r": RANK,
    "mask_type": Irrelevant(_DRAWN),
    "random_seed": Irrelevant(_DRAWN),
    "init_weights": START,
}


def _check(name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings) -> None:
    inputs, outputs = module.in_features, module.out_features
    count = Served(rank * (inputs + outputs))
    shapes = {_VALUES: (count,), _PLACES: (2, count)}
    if not rank or not check_roles(name, roles, shapes, findings):
        return
    if not check_width(name, module, findings):
        return
    # PEFT writes them as floating-point numbers on some systems.
    places = roles[_PLACES].to(torch.float64)
    if not bool((places == places.floor()).all()):
        findings.add(f"{name}.{_PLACES}", "are no integers")
        return
    limits = torch.tensor([[outputs], [inputs]])
    if bool(((places < 0) | (places >= limits)).any()):
        findings.add(f"{name}.{_PLACES}", f"are not within [{outputs}, {inputs}]")


_FORMAT = ModuleFormat(
    rules=SHIRA_RULES,
    roles={f".{role}": role for role in (_VALUES, _PLACES)},
    check=_check,
    # It says how many places there are; the update has any rank.
    rank_of=lambda _roles, _rank: 0,
)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    operators = {}
    for name, roles in found.modules.items():
        rows, columns = roles[_PLACES].to(torch.int64)
        module = base.modules[name]
        operators[name] = ModuleOperators(
            sparse=sparse_of(rows, columns, roles[_VALUES], module, base.dtype)
        )
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


METHOD = Method("shira", {"SHIRA"}, SHIRA_RULES, lower, integers=(_PLACES,))
