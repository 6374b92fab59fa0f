"""Uni-LoRA (arXiv 2506.00799): ``Δ(x) = B A x``, every entry one of ``D`` shared values, scaled.

``A = θ[i_A] ⊙ s_A``, ``B = θ[i_B] ⊙ s_B``. Unless ``save_indices`` put them into the file, the
indices are drawn again as PEFT draws them: ``0 … D − 1`` as often as it takes, shuffled, and dealt
to the modules in the model's order, A before B; where ``n`` entries share a value, their scale is
``1/√n``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_bool, is_rank, is_seed
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
    ModuleCheckpoint,
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_roles

_THETA = "base_model.unilora_theta_d"
_INDICES, _SCALES = "unilora_indices_", "unilora_scales_"
_ROLES = tuple(kind + factor for kind in (_INDICES, _SCALES) for factor in "AB")
_DRAWN = (
    "the indices of theta_d are not in the file; they were drawn again from proj_seed, as PEFT does"
    " with the numpy installed here; save_indices would put them into the file"
)

UNILORA_RULES: Rules = {
    **TARGET_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    **bias_rules("unilora_only"),
    "r": RANK,
    "proj_seed": Used(is_seed),
    "theta_d_length": Used(is_rank),
    "save_indices": Used(is_bool),
    "unilora_dropout": DROPOUT,
    "init_theta_d_bound": START,
    "init_weights": START,
}

# Values of a factor, ``[rank, in_features]`` or ``[out_features, rank]``: index and scale.
_Entries = tuple[torch.Tensor, torch.Tensor]


def _check(
    name: str,
    roles: Roles,
    module: BaseModule,
    rank: int,
    findings: Findings,
    *,
    config: Mapping[str, Any],
) -> None:
    shapes = {}
    if config.get("save_indices"):
        for kind in (_INDICES, _SCALES):
            shapes[f"{kind}A"] = (rank, Served(module.in_features))
            shapes[f"{kind}B"] = (Served(module.out_features), rank)
    if not check_roles(name, roles, shapes, findings):
        return
    for role in shapes:
        if role.startswith(_INDICES):
            indices, length = roles[role], config["theta_d_length"]
            if indices.is_floating_point():
                findings.add(f"{name}.{role}", "must hold integers")
            elif not 0 <= int(indices.min()) <= int(indices.max()) < length:
                why = f"must be at least 0 and less than theta_d_length, {length}"
                findings.add(f"{name}.{role}", why)


def _format(config: Mapping[str, Any]) -> ModuleFormat:
    return ModuleFormat(
        rules=UNILORA_RULES,
        roles={f".{role}": role for role in _ROLES},
        check=functools.partial(_check, config=config),
        bias_only="unilora_only",
        shared=frozenset({_THETA}),
        also_required=("theta_d_length", "proj_seed"),
        needs_tensors=config.get("save_indices") is True,
    )


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    found = read_module_checkpoint(checkpoint, base, _format(config), max_rank)
    findings = Findings(checkpoint.path, base.name)
    theta = found.shared.get(_THETA)
    if theta is None:
        findings.add(_THETA, "is missing")
    else:
        findings.check_shape(_THETA, theta, (config["theta_d_length"],), of_base=False)
    if not found.modules:
        findings.add("target_modules", "selects no module of the base model")
    findings.raise_if_any()
    assert theta is not None  # or there was a fault
    theta = theta.to(torch.promote_types(theta.dtype, torch.float32))
    is_saved = config.get("save_indices") is True
    entries = _saved(found) if is_saved else _dealt(config, found, base)
    operators = {}
    for name, factors in entries.items():
        a, b = (theta[indices] * scales.to(theta.dtype) for indices, scales in factors)
        operators[name] = ModuleOperators(fold(a, b, 1.0, base.dtype))
    warnings = () if is_saved else (_DRAWN,)
    return finish(
        checkpoint, base, operators, found=found, warnings=warnings, depends_on_base=False
    )


def _saved(found: ModuleCheckpoint) -> dict[str, tuple[_Entries, _Entries]]:
    return {
        name: (
            (roles[f"{_INDICES}A"].long(), roles[f"{_SCALES}A"]),
            (roles[f"{_INDICES}B"].long(), roles[f"{_SCALES}B"]),
        )
        for name, roles in found.modules.items()
    }


def _dealt(
    config: Mapping[str, Any], found: ModuleCheckpoint, base: BaseModel
) -> dict[str, tuple[_Entries, _Entries]]:
    shapes = []
    for name, rank in found.ranks.items():
        module = base.modules[name]
        shapes += [(rank, module.in_features), (module.out_features, rank)]
    total = sum(rows * columns for rows, columns in shapes)
    indices = draw_indices(config["proj_seed"], config["theta_d_length"], total)
    counts = torch.bincount(indices, minlength=config["theta_d_length"])
    # PEFT keeps the scales in the dtype of the base's weights.
    scales = counts.clamp(min=1).to(torch.float32).rsqrt().to(base.dtype)
    dealt = [
        (part.view(shape), scales[part].view(shape))
        for part, shape in zip(indices.split([r * c for r, c in shapes]), shapes, strict=True)
    ]
    return dict(zip(found.ranks, zip(dealt[::2], dealt[1::2], strict=True), strict=True))


def draw_indices(seed: int, length: int, total: int) -> torch.Tensor:
    """PEFT's indices for all entries of all modules, ``[total]`` int64."""
    generator = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), total // length)
    if total % length:
        more = generator.choice(length, size=total % length, replace=False)
        indices = np.concatenate([indices, more])
    generator.shuffle(indices)
    return torch.from_numpy(indices)


METHOD = Method(
    "unilora", {"UNILORA"}, UNILORA_RULES, lower, integers=(f"{_INDICES}A", f"{_INDICES}B")
)
