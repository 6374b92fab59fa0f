"""RoAd (arXiv 2409.00119): pairs of outputs are turned and scaled, ``y = R (W x + b)``.

Outputs come in groups, whose halves are partners. With ``z = W x + b``, ``y_o = c_o z_o − s_o
z_p(o)`` in the first half and ``c_o z_o + s_o z_p(o)`` in the second. ``c = α cos θ`` and ``s = α
sin θ``, of a pair (``road_1``), of an output (``road_2``), or each with its own ``α`` and ``θ``
(``road_4``). That is a gain ``c``, what partners add, and ``R b − b`` added to the bias.
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
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators, PairRotation
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_one_of
from turret.server.adapters.peft_format.config.selection_rules import START, TARGET_RULES
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_divides, check_roles

_THETA, _ALPHA = "road_theta", "road_alpha"


def _is_group(value: Any) -> str | None:
    is_even = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return None if is_even and value % 2 == 0 else f"must be an even number > 0, not {value!r:.60}"


ROAD_RULES: Rules = {
    **TARGET_RULES,
    "variant": Used(is_one_of("road_1", "road_2", "road_4")),
    "group_size": Used(_is_group),
    "init_weights": START,
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
    if findings.fields & {"variant", "group_size"}:
        return
    out = module.out_features
    if check_divides(name, out, config["group_size"], "outputs", findings):
        sizes = {"road_1": out // 2, "road_2": out, "road_4": 2 * out}
        size = sizes[config["variant"]]
        # What another variant would have is no other base's.
        is_other = any(len(t) in sizes.values() for t in roles.values() if t.ndim == 1)
        wanted = size if is_other else Served(size)
        check_roles(name, roles, {_THETA: (wanted,), _ALPHA: (wanted,)}, findings)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    form = ModuleFormat(
        rules=ROAD_RULES,
        roles={f".{_THETA}": _THETA, f".{_ALPHA}": _ALPHA},
        check=functools.partial(_check, config=config),
        rank_key=None,
        also_required=("variant", "group_size"),
    )
    found = read_module_checkpoint(checkpoint, base, form, max_rank)
    group, operators = config["group_size"], {}
    for name, roles in found.modules.items():
        theta, alpha = (roles[role].to(torch.float64) for role in (_THETA, _ALPHA))
        cosine, sine = _columns(config["variant"], group, theta, alpha)
        signs = torch.tensor([-1.0, 1.0]).repeat_interleave(group // 2)
        sine = sine * signs.repeat(len(sine) // group)
        operators[name] = _operators(cosine.float(), sine.float(), group, base.modules[name])
    depends_on_base = any(ops.bias is not None for ops in operators.values())
    return finish(checkpoint, base, operators, found=found, depends_on_base=depends_on_base)


def _columns(
    variant: str, group: int, theta: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``c`` and ``s`` of every output."""
    if variant == "road_1":
        theta, alpha = (
            values.view(-1, group // 2).repeat_interleave(2, 0).flatten()
            for values in (theta, alpha)
        )
    if variant != "road_4":
        return alpha * theta.cos(), alpha * theta.sin()
    thetas, alphas = theta.view(-1, 2, group), alpha.view(-1, 2, group)
    cosine, sine = alphas[:, 0] * thetas[:, 0].cos(), alphas[:, 1] * thetas[:, 1].sin()
    return cosine.flatten(), sine.flatten()


def _operators(
    cosine: torch.Tensor, sine: torch.Tensor, group: int, module: BaseModule
) -> ModuleOperators:
    bias = None
    if module.bias is not None:
        served = module.bias.to(torch.float32).cpu()
        partners = served.view(-1, 2, group // 2).flip(1).flatten()
        bias = (cosine - 1.0) * served + sine * partners
    return ModuleOperators(pairs=PairRotation(sine, group), gain=cosine, bias=bias)


METHOD = Method("road", {"ROAD"}, ROAD_RULES, lower)
