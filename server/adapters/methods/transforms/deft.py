"""DEFT (and PaRa): a subspace of the outputs is taken from ``W`` and filled anew.

``ΔW = Q (s R − Fᵀ W)``: with ``relu``, ``Q = P`` and ``F = relu(P)``; with ``qr``, both are the
orthonormal factor of ``P``. ``para`` only takes away (no ``R``). ``s`` is ``alpha / r``, or 1
without ``alpha``.
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
from turret.server.adapters.lowering.weight_products import times_weight
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.rules import (
    Rules,
    Used,
    is_bool,
    is_number,
    is_one_of,
)
from turret.server.adapters.peft_format.config.selection_rules import (
    CONV1D_RULES,
    DROPOUT,
    LAYER_RULES,
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

_P, _R = "deft_P", "deft_R"


def _is_alpha(value: Any) -> str | None:
    return None if value is None else is_number(value)


DEFT_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    **bias_rules("deft_only"),
    "r": RANK,
    "alpha": Used(_is_alpha),
    "decomposition_method": Used(is_one_of("relu", "qr")),
    "para": Used(is_bool),
    "deft_dropout": DROPOUT,
    "init_scale": START,
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
    # PEFT caps the rank there.
    rank = min(rank, module.out_features)
    shapes: dict[str, tuple[int, ...]] = {_P: (Served(module.out_features), rank)}
    if not config["para"]:
        shapes[_R] = (rank, Served(module.in_features))
    check_roles(name, roles, shapes, findings)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    form = ModuleFormat(
        rules=DEFT_RULES,
        roles={f".{_P}": _P, f".{_R}": _R},
        check=functools.partial(_check, config=config),
        rank_of=lambda roles, _rank: roles[_P].shape[1],
        bias_only="deft_only",
        also_required=("decomposition_method", "para"),
    )
    found = read_module_checkpoint(checkpoint, base, form, max_rank)
    operators = {}
    with base.beside():
        for name, roles in found.modules.items():
            # R's rows mean the columns of this Q, signs included: factored as PEFT does, in fp32.
            p = roles[_P].to(torch.float32)
            is_qr = config["decomposition_method"] == "qr"
            left = torch.linalg.qr(p)[0] if is_qr else p
            taken = left if is_qr else p.relu()
            wide = torch.promote_types(roles[_P].dtype, torch.float32)
            a = -times_weight(taken.T.to(wide), base.modules[name].rows())
            if _R in roles:
                scaling = config["alpha"] / p.shape[1] if config.get("alpha") else 1.0
                a += roles[_R].to(wide) * scaling
            operators[name] = ModuleOperators(fold(a, left.to(wide), 1.0, base.dtype))
    return finish(checkpoint, base, operators, found=found)


METHOD = Method("deft", {"DEFT"}, DEFT_RULES, lower)
