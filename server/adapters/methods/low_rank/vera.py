"""VeRA (arXiv 2310.11454): ``Δ(x) = λ_b ⊙ B (λ_d ⊙ (A x))`` with A, B that all modules share.

Each module multiplies the corner of A and B that fits its sizes, so what is served per module is a
low-rank update with the two vectors folded in.
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
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_bool, is_seed
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

_LAMBDA_B, _LAMBDA_D = "vera_lambda_b", "vera_lambda_d"
_A, _B = "base_model.vera_A", "base_model.vera_B"

VERA_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    "r": RANK,
    **bias_rules("vera_only"),
    "save_projection": Used(is_bool),
    "projection_prng_key": Used(is_seed),
    "vera_dropout": DROPOUT,
    "d_initial": START,
    "init_weights": START,
}


def _check(name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings) -> None:
    lambda_b, lambda_d = roles.get(_LAMBDA_B), roles.get(_LAMBDA_D)
    for role, tensor in ((_LAMBDA_B, lambda_b), (_LAMBDA_D, lambda_d)):
        if tensor is None:
            findings.add(f"{name}.{role}", "is missing; its partner is there")
    if lambda_b is not None:
        findings.check_shape(f"{name}.{_LAMBDA_B}", lambda_b, (module.out_features,))
    if lambda_d is not None and rank:
        findings.check_shape(f"{name}.{_LAMBDA_D}", lambda_d, (rank,), of_base=False)


_FORMAT = ModuleFormat(
    rules=VERA_RULES,
    roles={f".{_LAMBDA_B}": _LAMBDA_B, f".{_LAMBDA_D}": _LAMBDA_D},
    check=_check,
    bias_only="vera_only",
    shared=frozenset({_A, _B}),
)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    findings = Findings(checkpoint.path, base.name)
    rank: int = config["r"]
    a, b = shared_projections(config, found, base, a=(_A, rank), b=(_B, rank), findings=findings)
    findings.raise_if_any()
    # The folded factors are large: one module's at a time, and only the result is kept.
    operators = {}
    for name, roles in found.modules.items():
        wide = torch.promote_types(a.dtype, torch.float32)
        lambda_b, lambda_d = (roles[role].to(wide) for role in (_LAMBDA_B, _LAMBDA_D))
        module = base.modules[name]
        low_rank = fold_shared(lambda_b, lambda_d, a, b, module=module, dtype=base.dtype)
        operators[name] = ModuleOperators(low_rank)
    warnings = drawn_warning(config, "vera_A and vera_B")
    return finish(
        checkpoint, base, operators, found=found, warnings=warnings, depends_on_base=False
    )


METHOD = Method("vera", {"VERA"}, VERA_RULES, lower)
