"""VB-LoRA (arXiv 2405.15179): ``Δ(x) = B A x``, both factors cut from one bank of vectors.

A sub-vector of a factor is ``Σ_t softmax(l)_t bank[t]`` over the ``topk`` largest logits. The file
has the logits or, with ``save_only_topk_weights``, what is left of them.
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
from turret.server.adapters.peft_format.config.rules import Rules, Used, is_bool, is_rank
from turret.server.adapters.peft_format.config.selection_rules import (
    CONV1D_RULES,
    DROPOUT,
    LAYER_RULES,
    RANK,
    SELECTION_RULES,
    START,
    bias_rules,
)
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.role_shapes import Served, check_divides, check_roles

_BANK = "base_model.vblora_vector_bank"
_A, _B = "vblora_logits_A", "vblora_logits_B"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_ROLES = (_A, _B, *(factor + part for factor in (_A, _B) for part in (_INDICES, _WEIGHTS)))
_SIZES = ("num_vectors", "vector_length", "topk")

VBLORA_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    **bias_rules("vblora_only"),
    "r": RANK,
    **dict.fromkeys(_SIZES, Used(is_rank)),
    "save_only_topk_weights": Used(is_bool),
    "vblora_dropout": DROPOUT,
    "init_vector_bank_bound": START,
    "init_logits_std": START,
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
    vectors, length, topk = (config[key] for key in _SIZES)
    sizes = ((module.in_features, "inputs"), (module.out_features, "outputs"))
    divides = [check_divides(name, size, length, what, findings) for size, what in sizes]
    if not all(divides):
        return
    places = {
        _A: (rank, Served(module.in_features // length)),
        _B: (Served(module.out_features // length), rank),
    }
    shapes = {}
    for factor, place in places.items():
        if config.get("save_only_topk_weights"):
            shapes[factor + _INDICES] = (*place, topk)
            shapes[factor + _WEIGHTS] = (*place, topk - 1)
        else:
            shapes[factor] = (*place, vectors)
    if check_roles(name, roles, shapes, findings) and config.get("save_only_topk_weights"):
        for factor in places:
            _check_indices(
                f"{name}.{factor}{_INDICES}", roles[factor + _INDICES], vectors, findings
            )


def _check_indices(field: str, indices: torch.Tensor, vectors: int, findings: Findings) -> None:
    if indices.is_floating_point():
        findings.add(field, "must hold integers")
        return
    ordered = indices.long().sort(-1).values
    if ordered.numel() and not 0 <= int(ordered.min()) <= int(ordered.max()) < vectors:
        findings.add(field, f"must be at least 0 and less than num_vectors, {vectors}")
    elif bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        findings.add(field, "names a vector twice in one place")


def _format(config: Mapping[str, Any]) -> ModuleFormat:
    return ModuleFormat(
        rules=VBLORA_RULES,
        roles={f".{role}": role for role in _ROLES},
        check=functools.partial(_check, config=config),
        bias_only="vblora_only",
        shared=frozenset({_BANK}),
        also_required=_SIZES,
    )


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    found = read_module_checkpoint(checkpoint, base, _format(config), max_rank)
    findings = Findings(checkpoint.path, base.name)
    vectors, length, topk = (config[key] for key in _SIZES)
    if topk > vectors:
        findings.add("topk", f"is {topk}, there are {vectors} vectors")
    bank = found.shared.get(_BANK)
    if bank is None:
        findings.add(_BANK, "is missing")
    else:
        findings.check_shape(_BANK, bank, (vectors, length), of_base=False)
    findings.raise_if_any()
    assert bank is not None  # or there was a fault
    bank = bank.to(torch.promote_types(bank.dtype, torch.float32))
    operators = {}
    for name, roles in found.modules.items():
        a, b = (_vectors(roles, factor, bank, topk) for factor in (_A, _B))
        # A place of B holds a piece of each rank's column.
        b = b.transpose(1, 2).flatten(0, 1)
        operators[name] = ModuleOperators(fold(a.flatten(1), b, 1.0, base.dtype))
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


def _vectors(roles: Roles, factor: str, bank: torch.Tensor, topk: int) -> torch.Tensor:
    """The mixed vectors of a factor's places, ``[…, vector_length]``."""
    if factor in roles:
        kept, indices = roles[factor].to(bank.dtype).topk(topk, dim=-1)
        weights = kept.softmax(-1)
    else:
        indices, part = roles[factor + _INDICES].long(), roles[factor + _WEIGHTS].to(bank.dtype)
        # The last weight is what the others leave of 1.
        weights = torch.cat((part, 1.0 - part.sum(-1, keepdim=True)), dim=-1)
    return (weights.unsqueeze(-1) * bank[indices]).sum(-2)


METHOD = Method(
    "vblora", {"VBLORA"}, VBLORA_RULES, lower, integers=(f"{_A}{_INDICES}", f"{_B}{_INDICES}")
)
