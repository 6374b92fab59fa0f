"""PEANuT (arXiv 2410.01870): ``ΔWᵀ = s · f(… f(Wᵀ Aᵀ) …) Bᵀ``, a network that reads the weight.

``depth`` encoders and as many decoders follow ``A``, each a square matrix and the activation, and
each decoder adds what its encoder took. The network runs once, at load: its result is a factor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.lowering.weight_products import times_weight
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_number
from turret.server.adapters.peft_format.config.selection_rules import (
    LAYER_RULES,
    RANK,
    SELECTION_RULES,
    START,
)
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_roles

_A, _B = "peanut_A.weight", "peanut_B.weight"
_MAX_DEPTH = 64
# As transformers names them.
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def _is_activation(value: Any) -> str | None:
    if isinstance(value, str) and value in ACTIVATIONS:
        return None
    return f"is {value!r:.60}; served values: {', '.join(ACTIVATIONS)}"


def _is_depth(value: Any) -> str | None:
    ok = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_DEPTH
    return None if ok else f"must be an integer from 0 to {_MAX_DEPTH}, not {value!r:.60}"


PEANUT_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    "r": RANK,
    "depth": Used(_is_depth),
    "act_fn": Used(_is_activation),
    "scaling": Used(is_number),
    "init_weights": START,
}


def _layers(depth: int) -> tuple[list[str], list[str]]:
    kinds = ("peanut_encoders", "peanut_decoders")
    encoders, decoders = ([f"{kind}.{i}.weight" for i in range(depth)] for kind in kinds)
    return encoders, decoders


def _check(
    name: str,
    roles: Roles,
    module: BaseModule,
    rank: int,
    findings: Findings,
    *,
    config: Mapping[str, Any],
) -> None:
    shapes = {_A: (rank, Served(module.out_features)), _B: (Served(module.out_features), rank)}
    for names in _layers(config["depth"]):
        shapes |= dict.fromkeys(names, (rank, rank))
    check_roles(name, roles, shapes, findings)


def _format(config: Mapping[str, Any]) -> ModuleFormat:
    # A key at fault is reported by the reader, which then reads no tensors.
    depth = config.get("depth")
    encoders, decoders = _layers(depth if depth is not None and _is_depth(depth) is None else 0)
    return ModuleFormat(
        rules=PEANUT_RULES,
        roles={f".{role}": role for role in (_A, _B, *encoders, *decoders)},
        check=functools.partial(_check, config=config),
        also_required=("depth", "act_fn", "scaling"),
    )


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    found = read_module_checkpoint(checkpoint, base, _format(config), max_rank)
    operators = {}
    with base.beside():
        for name, roles in found.modules.items():
            wide = torch.promote_types(roles[_A].dtype, torch.float32)
            read = times_weight(roles[_A].to(wide), base.modules[name].rows())
            a = _network(read.T, roles, config)
            operators[name] = ModuleOperators(fold(a.T, roles[_B], config["scaling"], base.dtype))
    return finish(checkpoint, base, operators, found=found)


def _network(x: torch.Tensor, roles: Roles, config: Mapping[str, Any]) -> torch.Tensor:
    """``[in_features, rank]`` → the same."""
    activation = ACTIVATIONS[config["act_fn"]]
    encoders, decoders = _layers(config["depth"])
    x, kept = activation(x), []
    for role in encoders:
        kept.append(x)
        x = activation(x @ roles[role].to(x.dtype).T)
    for role in decoders:
        x = activation(x @ roles[role].to(x.dtype).T) + kept.pop()
    return x


METHOD = Method("peanut", {"PEANUT"}, PEANUT_RULES, lower)
