"""PVeRA: VeRA with a distribution in the middle, of which inference takes the mean.

``Δ(x) = λ_b ⊙ B (λ_d ⊙ (A x))`` with the first ``r`` of ``2 r`` shared rows of ``A`` and values of
``λ_d``; the others are the logarithm of the variance.
"""

from __future__ import annotations

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.lowering.shared_factors import (
    drawn_warning,
    fold_shared,
    shared_projections,
)
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.rules import (
    Irrelevant,
    Rejected,
    Rules,
    Used,
    is_bool,
    is_seed,
)
from turret.server.adapters.peft_format.config.selection_rules import (
    CONV1D_RULES,
    DROPOUT,
    LAYER_RULES,
    RANK,
    START,
    TARGET_RULES,
    bias_rules,
)
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_roles

_LAMBDA_B, _LAMBDA_D = "pvera_lambda_b", "pvera_lambda_d"
_A, _B = "base_model.pvera_A", "base_model.pvera_B"

PVERA_RULES: Rules = {
    **TARGET_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    **bias_rules("pvera_only"),
    "r": RANK,
    "save_projection": Used(is_bool),
    "projection_prng_key": Used(is_seed),
    "sample_at_inference": Rejected(
        (False, None), "draws another update at every call, which is not served; set it to false"
    ),
    "generator_seed": Irrelevant("seeds the sampling, which is off"),
    "pvera_dropout": DROPOUT,
    "d_initial": START,
    "init_weights": START,
}


def _check(name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings) -> None:
    shapes = {_LAMBDA_B: (Served(module.out_features),), _LAMBDA_D: (2 * rank,)}
    check_roles(name, roles, shapes, findings)


_FORMAT = ModuleFormat(
    rules=PVERA_RULES,
    roles={f".{_LAMBDA_B}": _LAMBDA_B, f".{_LAMBDA_D}": _LAMBDA_D},
    check=_check,
    bias_only="pvera_only",
    shared=frozenset({_A, _B}),
)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    findings = Findings(checkpoint.path, base.name)
    rank: int = config["r"]
    names = {"a": (_A, 2 * rank), "b": (_B, rank)}
    a, b = shared_projections(config, found, base, **names, findings=findings)
    findings.raise_if_any()
    operators = {}
    for name, roles in found.modules.items():
        wide = torch.promote_types(a.dtype, torch.float32)
        lambda_b, lambda_d = (roles[role].to(wide) for role in (_LAMBDA_B, _LAMBDA_D))
        module = base.modules[name]
        operators[name] = ModuleOperators(
            fold_shared(lambda_b, lambda_d[:rank], a[:rank], b, module=module, dtype=base.dtype)
        )
    warnings = drawn_warning(config, "pvera_A and pvera_B")
    return finish(
        checkpoint, base, operators, found=found, warnings=warnings, depends_on_base=False
    )


METHOD = Method("pvera", {"PVERA"}, PVERA_RULES, lower)
