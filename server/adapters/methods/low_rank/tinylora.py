"""TinyLoRA (arXiv 2602.04118): ``Δ(x) = B (Σ_i v_i P_i) A x``, a handful of trained ``v``.

A and B are singular directions of the weight it was trained on; the file has them, so that the
update is the same on any base. ``v`` belongs to a group of modules, ``P`` is random and fixed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.rules import (
    Rules,
    Used,
    is_bool,
    is_number,
    is_rank,
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

_A, _B, _P = "tinylora_A", "tinylora_B", "tinylora_P"
_V = "base_model.tinylora_v."
_GROUP = re.compile(re.escape(_V) + r"\d{1,9}")
_DRAWN = (
    "tinylora_P is not in the file; it was drawn again from projection_seed, as PEFT does;"
    " save_projection would put it into the file"
)


def _is_share(value: Any) -> str | None:
    problem = is_number(value)
    if problem is None and not 0 <= value <= 1:
        return f"must be between 0 and 1, not {value!r:.60}"
    return problem


TINYLORA_RULES: Rules = {
    **TARGET_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    **bias_rules("tinylora_only"),
    "r": RANK,
    "u": Used(is_rank),
    "weight_tying": Used(_is_share),
    "projection_seed": Used(is_seed),
    "save_projection": Used(is_bool),
    "tinylora_dropout": DROPOUT,
    "init_v_bound": START,
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
    shapes = {_A: (rank, Served(module.in_features)), _B: (Served(module.out_features), rank)}
    if config.get("save_projection", True):
        shapes[_P] = (config["u"], rank, rank)
    check_roles(name, roles, shapes, findings)


def _format(checkpoint: AdapterCheckpoint) -> ModuleFormat:
    return ModuleFormat(
        rules=TINYLORA_RULES,
        roles={f".{role}": role for role in (_A, _B, _P)},
        check=functools.partial(_check, config=checkpoint.config),
        bias_only="tinylora_only",
        shared=frozenset(name for name in checkpoint.tensors if _GROUP.fullmatch(name)),
        also_required=("u", "weight_tying", "projection_seed"),
    )


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    found = read_module_checkpoint(checkpoint, base, _format(checkpoint), max_rank)
    findings = Findings(checkpoint.path, base.name)
    groups = _groups(config["weight_tying"], len(found.modules))
    for name in sorted({f"{_V}{group}" for group in groups} ^ found.shared.keys()):
        is_there = name in found.shared
        findings.add(name, "belongs to no module" if is_there else "is missing; modules share it")
    for name, v in found.shared.items():
        findings.check_shape(name, v, (config["u"],), of_base=False)
    findings.raise_if_any()
    operators = {}
    for number, (name, roles) in enumerate(found.modules.items()):
        v = found.shared[f"{_V}{groups[number]}"]
        wide = torch.promote_types(v.dtype, torch.float32)
        p = roles[_P] if _P in roles else _draw(config, number, found.ranks[name])
        middle = torch.einsum("i,ijk->jk", v.to(wide), p.to(wide))
        b = roles[_B].to(wide) @ middle
        operators[name] = ModuleOperators(fold(roles[_A], b, 1.0, base.dtype))
    warnings = () if config.get("save_projection", True) else (_DRAWN,)
    return finish(
        checkpoint, base, operators, found=found, warnings=warnings, depends_on_base=False
    )


def _groups(tying: float, count: int) -> list[int]:
    """Which ``v`` each module has, in the model's order."""
    groups = max(1, round(count * (1.0 - tying)))
    size = max(1, count // groups)
    return [min(number // size, groups - 1) for number in range(count)]


def _draw(config: Mapping[str, Any], number: int, rank: int) -> torch.Tensor:
    """PEFT's fixed matrices of a module, ``[u, r, r]``."""
    generator = torch.Generator(device="cpu").manual_seed(config["projection_seed"] + number)
    size = config["u"], rank, rank
    return torch.normal(mean=0.0, std=1.0 / rank**0.5, size=size, generator=generator)


METHOD = Method("tinylora", {"TINYLORA"}, TINYLORA_RULES, lower)
