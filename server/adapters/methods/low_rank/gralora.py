"""GraLoRA (arXiv 2505.20355): a low-rank update in each of ``k × k`` blocks of the weight.

``y_j = s Σ_n B_j[n] A_n[j] x_n`` with ``s = alpha / (r + hybrid_r)``, plus ``s B A x`` of rank
``hybrid_r`` over the whole weight. All of it is one low-rank update of rank ``k·r + hybrid_r``,
whose factors are 0 outside the blocks.
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
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.updates import LowRank
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_count, is_rank
from turret.server.adapters.peft_format.config.selection_rules import (
    ALPHA,
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
from turret.server.adapters.peft_format.role_shapes import Served, check_divides, check_roles

_A, _B = "gralora_A", "gralora_B"
_A_WHOLE, _B_WHOLE = "gralora_A_general.weight", "gralora_B_general.weight"

GRALORA_RULES: Rules = {
    **TARGET_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    **bias_rules("gralora_only"),
    "r": RANK,
    "hybrid_r": Used(is_count),
    "alpha": ALPHA,
    "gralora_k": Used(is_rank),
    "gralora_dropout": DROPOUT,
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
    blocks, whole = config["gralora_k"], config["hybrid_r"]
    if rank % blocks:
        findings.add("r", f"is {rank}, which gralora_k, {blocks}, does not divide")
    sizes = ((module.in_features, "inputs"), (module.out_features, "outputs"))
    divides = [check_divides(name, size, blocks, what, findings) for size, what in sizes]
    if not all(divides):
        return
    shapes = {
        _A: (blocks, Served(module.in_features // blocks), rank),
        _B: (blocks, rank, Served(module.out_features // blocks)),
    }
    if whole:
        shapes[_A_WHOLE] = (whole, Served(module.in_features))
        shapes[_B_WHOLE] = (Served(module.out_features), whole)
    check_roles(name, roles, shapes, findings)


def _format(config: Mapping[str, Any]) -> ModuleFormat:
    return ModuleFormat(
        rules=GRALORA_RULES,
        roles={f".{role}": role for role in (_A, _B, _A_WHOLE, _B_WHOLE)},
        check=functools.partial(_check, config=config),
        rank_of=lambda roles, rank: roles[_A].shape[0] * rank + config["hybrid_r"],
        bias_only="gralora_only",
        also_required=("alpha", "gralora_k", "hybrid_r"),
    )


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    found = read_module_checkpoint(checkpoint, base, _format(config), max_rank)
    scaling = config["alpha"] / (config["r"] + config["hybrid_r"])
    operators = {
        name: ModuleOperators(_low_rank(roles, scaling, base.dtype))
        for name, roles in found.modules.items()
    }
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


def _low_rank(roles: Roles, scaling: float, dtype: torch.dtype) -> LowRank:
    """The blocks' factors in their places: one set of ``r/k`` ranks per pair of blocks."""
    a, b = roles[_A], roles[_B]
    blocks, inputs, rank = a.shape
    outputs, part = b.shape[2], rank // blocks
    wide_a = a.new_zeros(blocks, blocks, part, blocks, inputs)
    wide_b = b.new_zeros(blocks, outputs, blocks, blocks, part)
    # a: [n, i, (j, p)], b: [j, (n, p), o].
    for n in range(blocks):
        wide_a[:, n, :, n] = a[n].view(inputs, blocks, part).permute(1, 2, 0)
    for j in range(blocks):
        wide_b[j, :, j] = b[j].view(blocks, part, outputs).permute(2, 0, 1)
    whole_a = wide_a.view(blocks * rank, blocks * inputs)
    whole_b = wide_b.view(blocks * outputs, blocks * rank)
    if _A_WHOLE in roles:
        whole_a = torch.cat((whole_a, roles[_A_WHOLE].to(whole_a.dtype)))
        whole_b = torch.cat((whole_b, roles[_B_WHOLE].to(whole_b.dtype)), dim=1)
    return fold(whole_a, whole_b, scaling, dtype)


METHOD = Method("gralora", {"GRALORA"}, GRALORA_RULES, lower)
