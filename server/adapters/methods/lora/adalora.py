"""AdaLoRA (arXiv 2303.10512): ``Δ(x) = s·B (E ⊙ (A x))``, ranks pruned during training.

``s`` is PEFT's ``lora_alpha / (init_r + 1e-5)``: it divides by the initial rank in every module,
also in those that were pruned, down to rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.no_adapter import OTHER_TRAINING, SAVE_AGAIN
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.lora_rules import LORA_RULES, VARIANTS
from turret.server.adapters.peft_format.config.rules import (
    Irrelevant,
    Rejected,
    Rules,
    Used,
    is_number,
    is_rank,
)
from turret.server.adapters.peft_format.config.selection_rules import SELECTION_RULES
from turret.server.adapters.peft_format.config.targets import MAX_LIST_ITEMS
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleCheckpoint,
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)
from turret.server.basics.counted import counted

_ROLES = ("lora_A", "lora_B", "lora_E")
# PEFT adds it to the rank it divides by.
_EPSILON = 1e-5


def _is_alpha(value: Any) -> str | None:
    problem = is_number(value)
    if problem is None and value <= 0:
        # PEFT replaces it by a rank, which is another one after training than during it.
        return "must be greater than 0"
    return problem


def _is_masks(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > MAX_LIST_ITEMS:
        return f"must be an object with at most {MAX_LIST_ITEMS} keys"
    for key, mask in value.items():
        if not isinstance(mask, list) or not all(isinstance(kept, bool) for kept in mask):
            return f"{key!r} must be a list of true and false"
    return None


ADALORA_RULES: Rules = {
    # AdaLoRA's config extends LoRA's; what its layers read is stated below.
    **LORA_RULES,
    "init_r": Used(is_rank),
    "lora_alpha": Used(_is_alpha),
    "rank_pattern": Used(_is_masks),
    "r": Irrelevant("AdaLoRA starts from init_r"),
    "use_rslora": Irrelevant("AdaLoRA's layers do not read it"),
    "alpha_pattern": Irrelevant("AdaLoRA's layers do not read it"),
    "use_dora": Rejected((False, None), "cannot be combined with AdaLoRA"),
    "lora_bias": Rejected((False, None), "has no effect on AdaLoRA; train without it"),
    **{
        key: Rejected((False, None), "cannot be combined with AdaLoRA")
        for key in VARIANTS
        if key != "use_dora"
    },
    "target_parameters": Rejected((None, []), "cannot be combined with AdaLoRA"),
    "target_modules": SELECTION_RULES["target_modules"],
    "target_r": Irrelevant("aim of the pruning; the tensors show the result"),
    "tinit": Irrelevant("schedule of the pruning"),
    "tfinal": Irrelevant("schedule of the pruning"),
    "deltaT": Irrelevant("schedule of the pruning"),
    "beta1": Irrelevant("smoothing of the pruning"),
    "beta2": Irrelevant("smoothing of the pruning"),
    "orth_reg_weight": Irrelevant("weight of a training loss"),
    "total_step": Irrelevant("schedule of the pruning"),
}


def _check(name: str, roles: Roles, module: BaseModule, _rank: int, findings: Findings) -> None:
    missing = [role for role in _ROLES if role not in roles]
    for role in missing:
        findings.add(f"{name}.{role}", f"is missing; other factors are there: {SAVE_AGAIN}")
    if missing:
        return
    a, b, e = (roles[role] for role in _ROLES)
    rank = e.shape[0] if e.ndim else 0
    if findings.check_shape(f"{name}.lora_E", e, (rank, 1), of_base=False):
        findings.check_shape(f"{name}.lora_A", a, (rank, module.in_features))
        findings.check_shape(f"{name}.lora_B", b, (module.out_features, rank))


_FORMAT = ModuleFormat(
    rules=ADALORA_RULES,
    roles={f".{role}": role for role in _ROLES},
    check=_check,
    rank_key="init_r",
    # What pruning left.
    rank_of=lambda roles, _rank: len(roles["lora_E"]),
    alpha_key="lora_alpha",
    bias_only="lora_only",
)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    findings = Findings(checkpoint.path, base.name)
    _check_masks(config, found, findings)
    findings.raise_if_any()
    scaling = config["lora_alpha"] / (config["init_r"] + _EPSILON)
    operators = {}
    for name, rank in found.ranks.items():
        if rank:
            a, b, e = (found.modules[name][role] for role in _ROLES)
            wide = torch.promote_types(a.dtype, torch.float32)
            # E goes where the scaling goes, so that both factors are rounded once.
            b = b.to(wide) * e.to(wide).reshape(1, -1)
            operators[name] = ModuleOperators(fold(a, b, scaling, base.dtype))
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


def _check_masks(config: Mapping[str, Any], found: ModuleCheckpoint, findings: Findings) -> None:
    """The ranks in the file against ``init_r`` and the masks of ``rank_pattern``."""
    start = config["init_r"]
    ranks = dict.fromkeys(found.modules, start)
    for key, mask in (config.get("rank_pattern") or {}).items():
        name = key.removesuffix(".default").removesuffix(".lora_E")
        if name not in ranks:
            findings.add("rank_pattern", f"{key!r:.120} is no adapted module's lora_E")
        elif len(mask) != start:
            why = f"{key!r:.120} masks {counted(len(mask), 'rank')}, init_r is {start}"
            findings.add("rank_pattern", why)
        else:
            ranks[name] = sum(mask)
    for name, rank in ranks.items():
        there = found.ranks[name]
        if there != rank:
            why = f"has rank {there}, the config says {rank}; {OTHER_TRAINING}"
            findings.add(f"{name}.lora_E", why)


METHOD = Method("adalora", {"ADALORA"}, ADALORA_RULES, lower)
