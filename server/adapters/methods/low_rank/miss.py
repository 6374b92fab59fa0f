"""MiSS (arXiv 2409.15371), once Bone: ``Δ(x) = Mᵀ Σ_j x_j``, pieces of ``r`` inputs added up.

As factors: ``A`` is 0 but for ``A[i mod r, i] = 1``, ``B = Mᵀ``. With ``init_weights: "mini"`` the
file has the first ``mini_r`` columns of ``M``, which repeat. ``"bat"`` multiplies blocks of the
base's weight: ``ΔW_oi = (W_oi + I) M_o`` for each ``r`` outputs and ``r`` inputs, of any rank.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.dense import dense
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.updates import piece_sums
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_one_of, is_rank
from turret.server.adapters.peft_format.config.selection_rules import (
    DROPOUT,
    LAYER_RULES,
    RANK,
    SELECTION_RULES,
)
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_divides, check_roles

# Tensor of a module and value of ``bias`` for the targeted modules, by ``peft_type``.
_NAMES = {"MISS": ("miss_block", "MiSS_only"), "BONE": ("bone_block", "bone_only")}


def _is_start(value: Any) -> str | None:
    is_known = value in ("mini", "bat") or isinstance(value, bool)
    return None if is_known else f"is {value!r:.60}, unknown here"


def _is_bat(config: Mapping[str, Any]) -> bool:
    return config.get("init_weights") == "bat"


MISS_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    "bias": Used(is_one_of("none", "all", *(only for _, only in _NAMES.values()))),
    "r": RANK,
    "mini_r": Used(is_rank),
    "init_weights": Used(_is_start),
    "miss_dropout": DROPOUT,
}


def _check(
    name: str,
    roles: Roles,
    module: BaseModule,
    rank: int,
    findings: Findings,
    *,
    config: Mapping[str, Any],
    role: str,
) -> None:
    if _is_bat(config):
        _check_blocks(name, roles, module, rank, findings, role=role)
        return
    width: int = Served(module.out_features)
    if config.get("init_weights") == "mini":
        width = config.get("mini_r", 1)
        if not check_divides(name, module.out_features, width, "outputs", findings):
            return
    check_roles(name, roles, {role: (rank, width)}, findings)
    if rank > module.in_features:
        findings.mismatch(name, f"has {module.in_features} inputs, fewer than the rank {rank}")


def _check_blocks(
    name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings, *, role: str
) -> None:
    for size, what in ((module.out_features, "outputs"), (module.in_features, "inputs")):
        if not check_divides(name, size, max(rank, 1), what, findings):
            return
    count = Served(module.out_features // max(rank, 1))
    check_roles(name, roles, {role: (count, rank, rank)}, findings)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    role, only = _NAMES[config["peft_type"].upper()]
    form = ModuleFormat(
        rules=MISS_RULES,
        roles={f".{role}": role},
        check=functools.partial(_check, config=config, role=role),
        # A block's side; the update has any rank.
        rank_of=lambda _roles, rank: 0 if _is_bat(config) else rank,
        bias_only=only,
    )
    found = read_module_checkpoint(checkpoint, base, form, max_rank)
    operators, sums = {}, dict[tuple[int, int], torch.Tensor]()
    for name, roles in found.modules.items():
        block, module = roles[role], base.modules[name]
        if _is_bat(config):
            operators[name] = dense(_turned(block, module.dequantize()), base.dtype)
            continue
        b = block.T.repeat(module.out_features // block.shape[1], 1)
        size = len(block), module.in_features
        # One for all modules of a size: it is in memory once.
        a = sums.setdefault(size, piece_sums(*size, base.dtype))
        operators[name] = ModuleOperators(fold(a, b, 1.0, base.dtype))
    return finish(checkpoint, base, operators, found=found, depends_on_base=_is_bat(config))


def _turned(blocks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``(W_oi + I) M_o`` for all blocks of the weight, ``[out_features, in_features]``."""
    size, wide = blocks.shape[2], torch.promote_types(blocks.dtype, torch.float32)
    # [blocks of outputs, outputs, blocks of inputs, inputs]
    parts = weight.to(wide).unflatten(1, (-1, size)).unflatten(0, (-1, size))
    blocks = blocks.to(wide)
    # A product a block of outputs: broadcasting would copy a block for each of its outputs.
    turned = torch.bmm(parts.flatten(1, 2), blocks).view_as(parts) + blocks[:, :, None]
    return turned.flatten(2).flatten(0, 1)


METHOD = Method("miss", set(_NAMES), MISS_RULES, lower, is_dense=_is_bat)
