"""LoKr (LyCORIS, arXiv 2309.14859): ``Δ(x) = s·kron(w1, w2) x`` with ``s = alpha/r``.

Either factor may itself be a product of two. Which is so is decided by the tensors, never by
``decompose_both`` or ``decompose_factor``; the scale is PEFT's even where both factors are whole.
"""

from __future__ import annotations

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.no_adapter import OTHER_TRAINING, SAVE_AGAIN
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.updates import Kronecker
from turret.server.adapters.peft_format.config.rules import Irrelevant, Rules
from turret.server.adapters.peft_format.config.selection_rules import LYCORIS_RULES
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)

_ROLES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")

LOKR_RULES: Rules = {
    **LYCORIS_RULES,
    "rank_dropout_scale": Irrelevant("dropout is off at inference"),
    "decompose_both": Irrelevant("the tensors show which factors are decomposed"),
    "decompose_factor": Irrelevant("the tensors show the sizes of the factors"),
}


def _check(name: str, roles: Roles, module: BaseModule, rank: int, findings: Findings) -> None:
    is_2d = True
    for role, tensor in roles.items():
        if tensor.ndim != 2:
            findings.add(f"{name}.{role}", f"must be 2-D, not {list(tensor.shape)}")
            is_2d = False
    shapes = [_factor_shape(name, which, roles, rank, findings) for which in ("w1", "w2")]
    if not is_2d or not rank or None in shapes:
        return
    (out_l, in_m), (out_k, in_n) = (shape for shape in shapes if shape is not None)
    if out_l * out_k != module.out_features or in_m * in_n != module.in_features:
        adapter = f"{in_m}·{in_n} -> {out_l}·{out_k}"
        served = f"{module.in_features} -> {module.out_features}"
        findings.mismatch(name, f"the adapter maps {adapter}, the base model {served}")
    elif "lokr_w1" not in roles and out_l * in_m > out_k * in_n:
        # It is multiplied out; PEFT never makes it the larger one.
        findings.add(f"{name}.lokr_w1_a", "decomposes the larger factor; swap the two")


def _factor_shape(
    name: str, which: str, roles: Roles, rank: int, findings: Findings
) -> tuple[int, int] | None:
    """Rows and columns of ``w1`` or ``w2``, or None if its tensors are not one factor."""
    whole, left, right = (roles.get(f"lokr_{which}{part}") for part in ("", "_a", "_b"))
    field = f"{name}.lokr_{which}"
    if whole is not None:
        if left is not None or right is not None:
            findings.add(field, "is there whole and decomposed")
            return None
        return (whole.shape[0], whole.shape[1]) if whole.ndim == 2 else None
    if left is None or right is None:
        missing = field if left is right else f"{field}_{'a' if left is None else 'b'}"
        findings.add(missing, f"is missing; other factors are there: {SAVE_AGAIN}")
        return None
    if left.ndim != 2 or right.ndim != 2:
        return None
    if rank and not left.shape[1] == right.shape[0] == rank:
        ranks = f"{left.shape[1]} and {right.shape[0]}"
        why = f"has ranks {ranks}, the config says {rank}; {OTHER_TRAINING}"
        findings.add(f"{field}_a", why)
        return None
    return left.shape[0], right.shape[1]


def _rank(roles: Roles, rank: int) -> int:
    """Where both factors are whole, the rank is no more than a divisor of alpha."""
    return 0 if {"lokr_w1", "lokr_w2"} <= roles.keys() else rank


_FORMAT = ModuleFormat(
    rules=LOKR_RULES,
    roles={f".{role}": role for role in _ROLES},
    check=_check,
    rank_of=_rank,
    alpha_key="alpha",
    has_patterns=True,
)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    operators = {
        name: ModuleOperators(kronecker=_fold(roles, found.targets.scaling(name), base.dtype))
        for name, roles in found.modules.items()
    }
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


def _fold(roles: Roles, scaling: float, dtype: torch.dtype) -> Kronecker:
    """Multiplies out what is small, scales ``w1``, and rounds each tensor once."""
    wide = torch.promote_types(dtype, torch.float32)
    whole = {name: tensor.to(wide) for name, tensor in roles.items()}

    def factor(which: str) -> torch.Tensor:
        if f"lokr_{which}" in whole:
            return whole[f"lokr_{which}"]
        return whole[f"lokr_{which}_a"] @ whole[f"lokr_{which}_b"]

    w1 = (factor("w1") * scaling).to(dtype).contiguous()
    left, right = whole.get("lokr_w2_a"), whole.get("lokr_w2_b")
    if left is not None and right is not None:
        rows, columns, rank = left.shape[0], right.shape[1], right.shape[0]
        if rank * (rows + columns) < rows * columns:
            return Kronecker(w1, (left.to(dtype).contiguous(), right.to(dtype).contiguous()))
    return Kronecker(w1, factor("w2").to(dtype).contiguous())


METHOD = Method("lokr", {"LOKR"}, LOKR_RULES, lower)
