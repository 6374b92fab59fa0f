"""VeRA (arXiv 2310.11454): ``Δ(x) = λ_b ⊙ B (λ_d ⊙ (A x))`` with A, B that all modules share.

Each module multiplies the corner of A and B that fits its sizes, so what is served per module is a
low-rank update with the two vectors folded in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators import LowRank, ModuleOperators
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleCheckpoint,
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.rules import Irrelevant, Rules, Used, is_bool, is_one_of
from turret.server.adapters.peft_format.selection_rules import (
    CONV1D_RULES,
    LAYER_RULES,
    RANK,
    SELECTION_RULES,
)

_LAMBDA_B, _LAMBDA_D = "vera_lambda_b", "vera_lambda_d"
_A, _B = "base_model.vera_A", "base_model.vera_B"
_MAX_SEED = 2**63


def _is_seed(value: Any) -> str | None:
    ok = isinstance(value, int) and not isinstance(value, bool) and -_MAX_SEED <= value < _MAX_SEED
    return None if ok else f"must be a 64-bit integer, not {value!r:.60}"


VERA_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    "r": RANK,
    "bias": Used(is_one_of("none", "all", "vera_only")),
    "save_projection": Used(is_bool),
    "projection_prng_key": Used(_is_seed),
    "vera_dropout": Irrelevant("dropout is off at inference"),
    "d_initial": Irrelevant("sets the starting point of training"),
    "init_weights": Irrelevant("sets the starting point of training"),
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
    a, b = _projections(config, found, base, findings)
    findings.raise_if_any()
    # The folded factors are large: one module's at a time, and only the result is kept.
    operators = {
        name: ModuleOperators(_low_rank(roles, base.modules[name], a, b, base.dtype))
        for name, roles in found.modules.items()
    }
    drawn = (
        "vera_A and vera_B are not in the file; they were drawn again from projection_prng_key,"
        " as PEFT does"
    )
    warnings = (drawn,) if config.get("save_projection") is False else ()
    return finish(
        checkpoint, base, operators, found=found, warnings=warnings, depends_on_base=False
    )


def _projections(
    config: Mapping[str, Any], found: ModuleCheckpoint, base: BaseModel, findings: Findings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shared A ``[r, inputs]`` and B ``[outputs, r]``, at least as large as any module."""
    rank = config["r"]
    inputs = max(base.modules[name].in_features for name in found.modules)
    outputs = max(base.modules[name].out_features for name in found.modules)
    if config.get("save_projection", True):
        for name in (_A, _B):
            if name not in found.shared:
                findings.add(name, "is missing; save_projection is true")
        if findings.fields:
            return torch.empty(0), torch.empty(0)
        a, b = found.shared[_A], found.shared[_B]
        findings.check_shape(_A, a, (rank, inputs))
        findings.check_shape(_B, b, (outputs, rank))
        return a, b
    for name in found.shared:
        findings.add(name, "is there, but save_projection is false")
    if "projection_prng_key" not in config:
        findings.add("projection_prng_key", "is required; save_projection is false")
        return torch.empty(0), torch.empty(0)
    return draw_projections(config["projection_prng_key"], rank, inputs, outputs)


def draw_projections(
    seed: int, rank: int, inputs: int, outputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's initialisation: A, then B, uniform by Kaiming's rule, from one CPU generator."""
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def draw(rows: int, columns: int) -> torch.Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    a = draw(rank, inputs)
    return a, draw(outputs, rank)


def _low_rank(
    roles: Roles, module: BaseModule, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
) -> LowRank:
    wide = torch.promote_types(a.dtype, torch.float32)
    lambda_b, lambda_d = (roles[role].to(wide) for role in (_LAMBDA_B, _LAMBDA_D))
    # Both vectors go into b: a is then rounded as PEFT rounds it, and b once.
    b = lambda_b[:, None] * b[: module.out_features].to(wide) * lambda_d
    return fold(a[:, : module.in_features], b, 1.0, dtype)


METHOD = Method("vera", {"VERA"}, VERA_RULES, lower)
