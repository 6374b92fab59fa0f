"""BOFT (arXiv 2311.06243): ``y = s ⊙ W (x M) + b``, ``M`` a product of butterfly factors.

``M = M_N … M_1``, ``M_i = P_i diag(R) P_iᵀ``, each block of ``R`` Cayley's of the skew part of what
is saved. ``P_i`` moves inputs only within runs of ``b 2ⁱ⁻¹``, so ``M`` is block-diagonal again, of
blocks of ``b 2ᴺ⁻¹``. PEFT makes one factor where its CUDA extension is missing, whatever the config
says.
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
from turret.server.adapters.lowering.rotations import cayley
from turret.server.adapters.operators.adapter_operators import InputBlocks, ModuleOperators
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_count, is_rank
from turret.server.adapters.peft_format.config.selection_rules import (
    CONV1D_RULES,
    DROPOUT,
    LAYER_RULES,
    SELECTION_RULES,
    START,
    bias_rules,
)
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.refusals.limits import check_rank
from turret.server.adapters.peft_format.role_shapes import Served, check_divides, check_roles

_R, _S = "boft_R", "boft_s"

BOFT_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    **bias_rules("boft_only"),
    "boft_block_size": Used(is_count),
    "boft_block_num": Used(is_count),
    "boft_n_butterfly_factor": Used(is_rank),
    "boft_dropout": DROPOUT,
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
    if findings.fields & {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor"}:
        return
    size, number = config["boft_block_size"], config["boft_block_num"]
    if bool(size) == bool(number):
        findings.add("boft_block_size", "one of it and boft_block_num must be 0, and only one")
        return
    if not check_divides(name, module.in_features, size or number, "inputs", findings):
        return
    size = size or module.in_features // number
    found = roles.get(_R)
    factors = 1 if found is None or found.ndim != 4 else found.shape[0]
    shapes = {
        _R: (factors, Served(module.in_features // size), size, size),
        _S: (Served(module.out_features), 1),
    }
    if not check_roles(name, roles, shapes, findings):
        return
    if factors not in (1, config["boft_n_butterfly_factor"]):
        why = f"has {factors} factors, boft_n_butterfly_factor is"
        findings.add(f"{name}.{_R}", f"{why} {config['boft_n_butterfly_factor']}")
    elif factors > 1 and size % 2:
        findings.add(f"{name}.{_R}", f"has blocks of {size}, which a butterfly cannot halve")
    elif module.in_features % (size << (factors - 1)):
        check_divides(name, module.in_features, size << (factors - 1), "inputs", findings)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    form = ModuleFormat(
        rules=BOFT_RULES,
        roles={f".{_R}": _R, f".{_S}": _S},
        check=functools.partial(_check, config=checkpoint.config),
        rank_key=None,
        bias_only="boft_only",
        also_required=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
    )
    found = read_module_checkpoint(checkpoint, base, form, max_rank)
    saved = [roles[_R] for roles in found.modules.values()]
    largest = max(factors.shape[2] << (len(factors) - 1) for factors in saved)
    check_rank(checkpoint.path, largest, max_rank, name="block size")
    operators = {}
    for name, roles in found.modules.items():
        change = _product(roles[_R].to(torch.float64))
        operators[name] = ModuleOperators(
            input_blocks=InputBlocks(change.to(base.dtype).contiguous()),
            gain=roles[_S].reshape(-1).to(torch.float32),
        )
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


def _product(saved: torch.Tensor) -> torch.Tensor:
    """``M − I`` of ``[N, blocks, b, b]`` fp64, ``[blocks / 2ᴺ⁻¹, b 2ᴺ⁻¹, b 2ᴺ⁻¹]``."""
    num_factors, count, size, _ = saved.shape
    run = size << (num_factors - 1)
    total: torch.Tensor | None = None
    for number, factor in enumerate(saved):
        change = cayley(0.5 * (factor - factor.transpose(1, 2)))
        inside = change.view(count * size // run, run // size, size, size)
        wide = torch.stack([torch.block_diag(*blocks) for blocks in inside])
        order = _order(run, size << number, size // 2) if num_factors > 1 else torch.arange(run)
        wide = wide[:, order][:, :, order]
        # (I + C)(I + T) − I
        total = wide if total is None else wide + total + wide @ total
    assert total is not None
    return total


def _order(run: int, width: int, half: int) -> torch.Tensor:
    """The butterfly's order: in every ``width`` inputs the even halves of blocks, then the odd."""
    halves = torch.arange(run).view(run // width, width // half, half)
    return torch.cat((halves[:, ::2], halves[:, 1::2]), dim=1).flatten()


METHOD = Method("boft", {"BOFT"}, BOFT_RULES, lower)
