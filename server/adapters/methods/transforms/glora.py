"""GLoRA (arXiv 2306.07967): ``y = (W + W ⊙ A + B) x + b + b ⊙ D + E + W C``.

``A`` as a vector or a number is a gain, and ``B`` an update of rank 1; with ``lora``, PEFT's
default, ``A`` is a low-rank matrix that multiplies the weight entry by entry, and ``B`` a low-rank
update. ``C``, ``D`` and ``E`` change the bias, where the base has one.
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
from turret.server.adapters.lowering.low_rank import fold, modulated
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.lowering.weight_products import weight_times
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.rules import Rejected, Rules, Used, is_one_of
from turret.server.adapters.peft_format.config.selection_rules import RANK, START, TARGET_RULES
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_roles

_PARTS = ("Xd", "Xu", "X", "zeros")
_ROLES = tuple(f"glora_{path}.{part}" for path in "ABCDE" for part in _PARTS)


GLORA_RULES: Rules = {
    **TARGET_RULES,
    "r": RANK,
    "config_A_B": Used(is_one_of("lora", "vector", "constant", "none")),
    "config_C": Used(is_one_of("lora", "vector", "none")),
    "config_D_E": Used(is_one_of("constant", "vector", "none")),
    "bias": Rejected(("none", None), "biases trained beside GLoRA's own are not served"),
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
    inputs, outputs = Served(module.in_features), Served(module.out_features)
    weight = {
        "lora": {"Xd": (outputs, rank), "Xu": (rank, inputs)},
        "vector": {"X": (outputs, 1)},
        "constant": {"X": (1,)},
        "none": {"zeros": (outputs, inputs)},
    }
    column = {
        "lora": {"Xd": (inputs, rank), "Xu": (rank, 1)},
        "vector": {"X": (inputs, 1)},
        "none": {"zeros": (inputs, 1)},
    }
    bias = {"vector": {"X": (outputs,)}, "constant": {"X": (1,)}, "none": {"zeros": (outputs,)}}
    kinds = {"A": (weight, "config_A_B"), "B": (weight, "config_A_B"), "C": (column, "config_C")}
    kinds |= dict.fromkeys("DE", (bias, "config_D_E"))
    shapes: dict[str, tuple[int, ...]] = {}
    for path, (table, key) in kinds.items():
        # PEFT has nothing to train there where the base has no bias.
        is_empty = path in "CDE" and module.bias is None
        parts = table["none" if is_empty else config[key]]
        shapes |= {f"glora_{path}.{part}": shape for part, shape in parts.items()}
    if check_roles(name, roles, shapes, findings):
        for role in shapes:
            if role.endswith(".zeros") and bool(roles[role].any()):
                findings.add(f"{name}.{role}", "must be zero")


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    form = ModuleFormat(
        rules=GLORA_RULES,
        roles={f".{role}": role for role in _ROLES},
        check=functools.partial(_check, config=config),
        # C's rank is gone once it is multiplied out; a vector's is 1.
        rank_of=lambda _roles, rank: {"lora": rank, "none": 0}.get(config["config_A_B"], 1),
        also_required=("config_A_B", "config_C", "config_D_E"),
    )
    found = read_module_checkpoint(checkpoint, base, form, max_rank)
    operators = {}
    with base.beside():
        for name, roles in found.modules.items():
            operators[name] = _operators(roles, base.modules[name], base.dtype)
    return finish(checkpoint, base, operators, found=found)


def _operators(roles: Roles, module: BaseModule, dtype: torch.dtype) -> ModuleOperators:
    gain = low_rank = bias = update = None
    if "glora_A.Xd" in roles:
        update = modulated(roles["glora_A.Xu"], roles["glora_A.Xd"], dtype)
        low_rank = fold(roles["glora_B.Xu"], roles["glora_B.Xd"], 1.0, dtype)
    if "glora_A.X" in roles:
        gain = 1.0 + roles["glora_A.X"].to(torch.float32).reshape(-1).expand(module.out_features)
        b = roles["glora_B.X"].reshape(-1, 1).expand(module.out_features, 1)
        low_rank = fold(b.new_ones(1, module.in_features), b, 1.0, dtype)
    if module.bias is not None:
        bias = _bias(roles, module, module.bias)
    return ModuleOperators(low_rank, modulated=update, gain=gain, bias=bias)


def _bias(roles: Roles, module: BaseModule, served: torch.Tensor) -> torch.Tensor | None:
    """``b ⊙ D + E + W C``, or None where all three are nothing."""
    total, is_any = torch.zeros(module.out_features, dtype=torch.float32), False
    if "glora_D.X" in roles:
        scale, shift = (roles[f"glora_{path}.X"].to(torch.float32) for path in "DE")
        total, is_any = served.to(torch.float32).cpu() * scale + shift, True
    if "glora_C.zeros" not in roles:
        parts = [roles[f"glora_C.{part}"] for part in _PARTS if f"glora_C.{part}" in roles]
        column = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32))
        if len(parts) == 2:
            column = column @ parts[1].to(column.dtype)
        total, is_any = total + weight_times(module.rows(), column).reshape(-1).float(), True
    return total if is_any else None


METHOD = Method("glora", {"GLORA"}, GLORA_RULES, lower)
