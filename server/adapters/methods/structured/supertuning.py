"""Super-Tuning (arXiv 2607.09287): ``ΔW = S + s·B A``, ``S`` at the places of large weights.

Without ``r`` there is no low-rank part. The places are in the file; where they are left out, they
are those of the largest weights of the base it was trained on, which other weights do not tell.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.lowering.sparse import check_width, sparse_of
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.rules import (
    Irrelevant,
    Rejected,
    Rules,
    Used,
    is_number,
    is_rank,
)
from turret.server.adapters.peft_format.config.selection_rules import DROPOUT, START, TARGET_RULES
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_roles

_VALUES, _PLACES = "supertuning_values", "supertuning_indices"
_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"
_CHOSEN = "the file holds the places that it chose"


def _is_optional_rank(value: Any) -> str | None:
    return None if value is None else is_rank(value)


def _is_optional_alpha(value: Any) -> str | None:
    return None if value is None else is_number(value)


SUPERTUNING_RULES: Rules = {
    **TARGET_RULES,
    "r": Used(_is_optional_rank),
    "lora_alpha": Used(_is_optional_alpha),
    "lora_dropout": DROPOUT,
    "init_weights": START,
    "sparsity": Irrelevant(_CHOSEN),
    "select_top": Irrelevant(_CHOSEN),
    "save_precomputed_indices": Rejected(
        (True,),
        "leaves out the places of the update, which only the weights it was trained on tell; save"
        " it again there with save_precomputed_indices=True",
    ),
}


def _check(
    name: str,
    roles: Roles,
    module: BaseModule,
    _rank: int,
    findings: Findings,
    *,
    config: Mapping[str, Any],
) -> None:
    count = len(roles[_VALUES]) if _VALUES in roles and roles[_VALUES].ndim else 0
    shapes: dict[str, tuple[int, ...]] = {_VALUES: (count,), _PLACES: (count,)}
    rank = config.get("r")
    if rank is not None:
        shapes |= {_A: (rank, Served(module.in_features)), _B: (Served(module.out_features), rank)}
    if not check_roles(name, roles, shapes, findings) or not check_width(name, module, findings):
        return
    places = roles[_PLACES]
    if places.is_floating_point():
        findings.add(f"{name}.{_PLACES}", "are no integers")
    elif count and (int(places.min()) < 0 or int(places.max()) >= _size(module)):
        findings.mismatch(f"{name}.{_PLACES}", f"are not within the {_size(module)} weights")


def _size(module: BaseModule) -> int:
    return module.in_features * module.out_features


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    form = ModuleFormat(
        rules=SUPERTUNING_RULES,
        roles={f".{role}": role for role in (_VALUES, _PLACES, _A, _B)},
        check=functools.partial(_check, config=config),
        rank_key=None,
    )
    found = read_module_checkpoint(checkpoint, base, form, max_rank)
    rank, operators = config.get("r"), {}
    for name, roles in found.modules.items():
        module, places = base.modules[name], roles[_PLACES].long()
        rows, columns = places // module.in_features, places % module.in_features
        low_rank = None
        if rank is not None:
            # PEFT's default.
            alpha = config.get("lora_alpha")
            scaling = (2 * rank if alpha is None else alpha) / rank
            low_rank = fold(roles[_A], roles[_B], scaling, base.dtype)
        operators[name] = ModuleOperators(
            low_rank, sparse=sparse_of(rows, columns, roles[_VALUES], module, base.dtype)
        )
    ranks = () if rank is None else (rank,)
    return finish(checkpoint, base, operators, found=found, ranks=ranks, depends_on_base=False)


METHOD = Method("supertuning", {"SUPERTUNING"}, SUPERTUNING_RULES, lower, integers=(_PLACES,))
