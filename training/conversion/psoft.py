"""PSOFT (openreview FSHrinMArK): ``y += s B (R − I) A x``, ``B A`` the largest part of ``W``'s SVD.

The file holds what makes ``R`` and not the factors that it turns. They are computed as PEFT
computes them when it loads the adapter, by the same decomposition: which of two opposite singular
vectors comes out, and with it the update, is up to the linear algebra library.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from turret.server.adapters.base import BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.peft_format.config.rules import (
    Rules,
    Used,
    is_bool,
    is_count,
    is_number,
    is_one_of,
    is_rank,
    is_seed,
)
from turret.server.adapters.peft_format.config.selection_rules import (
    ALPHA,
    CONV1D_RULES,
    DROPOUT,
    LAYER_RULES,
    RANK,
    SELECTION_RULES,
    START,
)
from turret.server.adapters.peft_format.module_checkpoint import ModuleFormat, Roles
from turret.server.adapters.peft_format.role_shapes import check_roles
from turret.training.conversion.made_lora import MadeLora, peft_generator

_TURN, _OUT, _IN = "psoft_R.weight", "psoft_R.vector_b", "psoft_R.vector_a"
# PEFT's, where an older version of it did not write them.
DEFAULTS: Mapping[str, Any] = {
    "ab_svd_init": "psoft_init",
    "psoft_svd": "full",
    "psoft_svd_lowrank_niter": 10,
    "random_seed": 0,
    "psoft_orth": True,
    "psoft_mag_a": True,
    "psoft_mag_b": True,
    "use_cayley_neumann": False,
    "num_cayley_neumann_terms": 5,
    "cayley_neumann_eps": None,
}


def _is_optional_number(value: Any) -> str | None:
    return None if value is None else is_number(value)


_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    "r": RANK,
    "psoft_alpha": ALPHA,
    "ab_svd_init": Used(is_one_of("psoft_init", "pissa_init")),
    "psoft_svd": Used(is_one_of("full", "lowrank")),
    "psoft_svd_lowrank_niter": Used(is_count),
    "random_seed": Used(is_seed),
    "psoft_orth": Used(is_bool),
    "psoft_mag_a": Used(is_bool),
    "psoft_mag_b": Used(is_bool),
    "use_cayley_neumann": Used(is_bool),
    "num_cayley_neumann_terms": Used(is_rank),
    "cayley_neumann_eps": Used(_is_optional_number),
    "psoft_dropout": DROPOUT,
    "init_weights": START,
}


def format_of(config: Mapping[str, Any]) -> ModuleFormat:
    """How its checkpoint is written."""
    return ModuleFormat(
        rules=_RULES,
        roles={f".{role}": role for role in (_TURN, _OUT, _IN)},
        check=partial(_check, config={**DEFAULTS, **config}),
        alpha_key="psoft_alpha",
    )


def _check(
    name: str,
    roles: Roles,
    module: BaseModule,
    rank: int,
    findings: Findings,
    *,
    config: Mapping[str, Any],
) -> None:
    if not rank or findings.fields & _RULES.keys():
        return
    if rank > min(module.in_features, module.out_features):
        findings.mismatch(name, f"is smaller than the rank, {rank}")
    shapes = {_TURN: (rank * (rank - 1) // 2,) if config["psoft_orth"] else (rank, rank)}
    for role, key in ((_OUT, "psoft_mag_b"), (_IN, "psoft_mag_a")):
        if config[key]:
            shapes[role] = (rank,)
    check_roles(name, roles, shapes, findings)


def convert(
    roles: Roles, module: BaseModule, scaling: float, config: Mapping[str, Any], _path: str
) -> MadeLora:
    """One module's update, ``scaling`` included."""
    config = {**DEFAULTS, **config}
    weight = module.dequantize()
    rank = config["r"]
    left, values, right = _svd(weight, rank, config)
    values = values / scaling
    if config["ab_svd_init"] == "psoft_init":
        a, b = right, left * values
    else:
        root = values.sqrt()
        a, b = root[:, None] * right, left * root
    turn = rotation(roles, rank, config) - torch.eye(rank, dtype=torch.float64)
    wide = b.cpu().to(torch.float64) @ turn * scaling
    return MadeLora(a.cpu().float(), wide.float(), None)


def _svd(
    weight: torch.Tensor, rank: int, config: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[out, r]``, ``[r]`` and ``[r, in]``, by the calls that PEFT makes."""
    if config["psoft_svd"] == "full":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        with peft_generator(config["random_seed"], weight.device):
            niter = config["psoft_svd_lowrank_niter"]
            left, values, columns = torch.svd_lowrank(weight, q=rank, niter=niter)
        right = columns.T
    return left[:, :rank], values[:rank], right[:rank]


def rotation(roles: Roles, rank: int, config: Mapping[str, Any]) -> torch.Tensor:
    """``R``, ``[r, r]`` fp64."""
    turn = roles[_TURN].to(torch.float64)
    if config["psoft_orth"]:
        rows, columns = torch.triu_indices(rank, rank, 1)
        upper = torch.zeros(rank, rank, dtype=torch.float64)
        upper[rows, columns] = turn
        turn = _orthogonal(upper - upper.T, config)
    if config["psoft_mag_b"]:
        turn = roles[_OUT].to(torch.float64)[:, None] * turn
    return turn * roles[_IN].to(torch.float64) if config["psoft_mag_a"] else turn


def _orthogonal(skew: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """``(I + Q)(I − Q)⁻¹``, or the first terms of its series, the last of them halved."""
    eye = torch.eye(len(skew), dtype=skew.dtype)
    if not config["use_cayley_neumann"]:
        return torch.linalg.solve(eye - skew, eye + skew, left=False)
    eps, terms = config["cayley_neumann_eps"], config["num_cayley_neumann_terms"]
    norm = skew.norm()
    if eps is not None and norm > eps:
        skew = skew * (eps / (norm + 1e-12))
    total, power = eye, eye
    # PEFT's series: it always includes Q to Q³ once it includes Q², and a lone Q is not halved.
    last = max(terms - 1, 3) if terms > 2 else terms - 1
    for exponent in range(1, last + 1):
        power = power @ skew
        total = total + (1.0 if exponent == last > 2 else 2.0) * power
    return total
