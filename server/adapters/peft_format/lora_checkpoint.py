"""Sorts the tensors of a PEFT LoRA file by module and role; nothing may be left over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.peft_format.base_name import base_name_warning
from turret.server.adapters.peft_format.lora_rules import LORA_RULES, check_required
from turret.server.adapters.peft_format.rules import check_config
from turret.server.adapters.peft_format.targets import Targets, resolve_targets
from turret.server.adapters.source import TENSORS_FILE
from turret.server.errors import BudgetExceededError

A, B, LORA_BIAS, MAGNITUDE, BIAS = "lora_A", "lora_B", "lora_B.bias", "magnitude", "bias"

# Longest first: ".lora_B.bias" also ends with ".bias". The three magnitude spellings are PEFT's
# file format, PEFT's own parameter name, and the one of the original DoRA code.
_ROLES = (
    (".lora_A.weight", A),
    (".lora_B.weight", B),
    (".lora_B.bias", LORA_BIAS),
    (".lora_magnitude_vector.weight", MAGNITUDE),
    (".lora_magnitude_vector", MAGNITUDE),
    (".weight_m_wdecomp.weight", MAGNITUDE),
    # PEFT keeps a targeted module's own bias under base_layer, another module's in its place.
    (".base_layer.bias", BIAS),
    (".bias", BIAS),
)


# ``{module path: {role: tensor}}``; only modules of ``base.modules``.
LoraTensors = dict[str, dict[str, torch.Tensor]]


def sort_tensors(
    tensors: Mapping[str, torch.Tensor], base: BaseModel, findings: Findings
) -> LoraTensors:
    """Gives every tensor a module and a role, or a fault, or a mismatch."""
    result: LoraTensors = {}
    for name, tensor in tensors.items():
        module, role = _split(name)
        if role is None:
            findings.add(name, _advice(name))
        elif module in base.other_modules:
            findings.add(name, f"{module!r} cannot be adapted by this version")
        elif module not in base.modules:
            findings.mismatch(name, f"the base model has no module {module!r}")
        elif role in result.setdefault(module, {}):
            findings.add(name, f"is a second {role} of {module!r}")
        else:
            result[module][role] = tensor
    for module, roles in result.items():
        _check_shapes(module, roles, base, findings)
    return result


def _split(name: str) -> tuple[str, str | None]:
    for suffix, role in _ROLES:
        if name.endswith(suffix) and len(name) > len(suffix):
            return name.removesuffix(suffix), role
    return name, None


def _advice(name: str) -> str:
    if name.endswith(".weight") and ".lora_" not in name:
        return "is a whole weight; only those of embed_tokens and lm_head are served"
    return "is not a tensor this method knows; every tensor must be used"


def _check_shapes(
    name: str,
    roles: Mapping[str, torch.Tensor],
    base: BaseModel,
    findings: Findings,
) -> None:
    module = base.modules[name]
    a, b = roles.get(A), roles.get(B)
    if (a is None) != (b is None):
        missing = "lora_A" if a is None else "lora_B"
        findings.add(f"{name}.{missing}.weight", "is missing; its partner is there")
    if a is None and b is None and {LORA_BIAS, MAGNITUDE} & roles.keys():
        findings.add(f"{name}.lora_A.weight", "is missing; other LoRA tensors are there")
    for role, tensor in ((A, a), (B, b)):
        if tensor is not None and tensor.ndim != 2:
            findings.add(f"{name}.{role}.weight", f"must be 2-D, not {list(tensor.shape)}")
            return
    if a is not None and b is not None:
        if a.shape[0] != b.shape[1]:
            findings.add(f"{name}.lora_B.weight", f"has rank {b.shape[1]}, lora_A has {a.shape[0]}")
        if a.shape[1] != module.in_features or b.shape[0] != module.out_features:
            adapter = f"{a.shape[1]} -> {b.shape[0]}"
            served = f"{module.in_features} -> {module.out_features}"
            findings.mismatch(name, f"the adapter maps {adapter}, the base model {served}")
            return
    out = module.out_features
    shapes = {
        LORA_BIAS: [(out,)],
        MAGNITUDE: [(out,), (1, out), (out, 1)],
        BIAS: [(out,)],
    }
    for role, allowed in shapes.items():
        if role in roles and tuple(roles[role].shape) not in allowed:
            shape = list(roles[role].shape)
            findings.mismatch(f"{name} {role}", f"has shape {shape}, the base has {out} outputs")
    if BIAS in roles and module.bias is None:
        findings.mismatch(f"{name} bias", "the base model has no bias there")


_TARGET_KEYS = frozenset(
    {
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
    }
)


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The LoRA of one linear module, in the file's dtype.

    Attributes:
        name: Full module path.
        a: ``[rank, in_features]``.
        b: ``[out_features, rank]``, unscaled.
        scaling: ``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA.
        lora_bias: Bias inside ``lora_B``, ``[out_features]``, unscaled, or None.
        magnitude: DoRA's ``m``, ``[out_features]``, or None.
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    lora_bias: torch.Tensor | None
    magnitude: torch.Tensor | None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """All modules with LoRA, and the biases that replace the base's, per module path."""

    modules: tuple[LoraModule, ...]
    biases: Mapping[str, torch.Tensor]
    base_model: str
    warnings: tuple[str, ...]


def read_lora_layout(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None
) -> LoraLayout:
    """Checks a ``LORA`` checkpoint against itself and the base.

    Raises:
        AdapterCheckpointError: Unsupported or inconsistent; lists every key and tensor at fault.
        AdapterMismatchError: Sound, but for another base; lists every module that does not fit.
        BudgetExceededError: A rank over ``max_rank``.
    """
    config, findings = checkpoint.config, Findings(checkpoint.path, base.name)
    check_config(config, LORA_RULES, findings)
    check_required(config, findings)
    tensors = sort_tensors(checkpoint.tensors, base, findings)
    targets = None
    if not findings.fields & _TARGET_KEYS:
        linear, other = list(base.modules), sorted(base.other_modules)
        targets = resolve_targets(config, linear, other, findings)
        # A pattern that could not be matched says nothing about the modules.
        if not findings.fields & _TARGET_KEYS:
            _check_targets(targets, tensors, base, findings)
    _check_switches(config, targets, tensors, base, findings)
    is_empty = not any(A in roles for roles in tensors.values())
    if is_empty and not findings.mismatched and not checkpoint.is_partial:
        findings.add(TENSORS_FILE, "holds no LoRA tensors")
    findings.raise_if_any()
    assert targets is not None  # its keys had no fault
    _check_budget(checkpoint.path, tensors, max_rank)
    base_model = config.get("base_model_name_or_path") or ""
    name_warning = base_name_warning(base_model, base.name)
    return LoraLayout(
        modules=tuple(_module(name, tensors, targets, config) for name in _adapted(tensors, base)),
        biases={n: roles[BIAS] for n, roles in tensors.items() if BIAS in roles},
        base_model=base_model,
        warnings=targets.warnings + ((name_warning,) if name_warning else ()),
    )


def _adapted(tensors: LoraTensors, base: BaseModel) -> list[str]:
    """Modules with LoRA, in the base's order."""
    return [name for name in base.modules if A in tensors.get(name, {})]


def _module(
    name: str, tensors: LoraTensors, targets: Targets, config: Mapping[str, Any]
) -> LoraModule:
    roles = tensors[name]
    rank, alpha = targets.ranks[name], targets.alphas[name]
    magnitude = roles.get(MAGNITUDE)
    return LoraModule(
        name=name,
        a=roles[A],
        b=roles[B],
        scaling=alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank,
        lora_bias=roles.get(LORA_BIAS),
        magnitude=None if magnitude is None else magnitude.reshape(-1),
    )


def _check_targets(
    targets: Targets, tensors: LoraTensors, base: BaseModel, findings: Findings
) -> None:
    for name in sorted(targets.targeted & base.other_modules):
        findings.add("target_modules", f"{name!r} cannot be adapted by this version")
    # Of a module that does not fit the base, the mismatch is the news, not its absence.
    misfits = findings.mismatched
    for name in base.modules:
        tensor = tensors.get(name, {}).get(A)
        if tensor is None and name in targets.targeted and not misfits:
            if B not in tensors.get(name, {}):
                findings.add(f"{name}.lora_A.weight", "is missing; the config targets the module")
        elif tensor is not None and name not in targets.targeted:
            findings.add(f"{name}.lora_A.weight", "is there, but the config leaves it out")
        elif tensor is not None and tensor.ndim == 2 and tensor.shape[0] != targets.ranks[name]:
            why = f"has rank {tensor.shape[0]}, the config says {targets.ranks[name]}"
            findings.add(f"{name}.lora_A.weight", why)


def _check_switches(
    config: Mapping[str, Any],
    targets: Targets | None,
    tensors: LoraTensors,
    base: BaseModel,
    findings: Findings,
) -> None:
    """``use_dora``, ``lora_bias`` and ``bias`` against the tensors they promise or rule out."""
    for key, role, label in (
        ("use_dora", MAGNITUDE, "lora_magnitude_vector"),
        ("lora_bias", LORA_BIAS, "lora_B.bias"),
    ):
        is_on = config.get(key) is True
        for name, roles in tensors.items():
            if role in roles and not is_on:
                findings.add(f"{name}.{label}", f"is there, but {key} is not true")
            if role not in roles and is_on and A in roles:
                findings.add(f"{name}.{label}", f"is missing; {key} is true")
    bias = config.get("bias", "none")
    for name, module in base.modules.items():
        is_targeted = targets is not None and name in targets.targeted
        is_there = BIAS in tensors.get(name, {})
        may_be_there = bias == "all" or (bias == "lora_only" and is_targeted)
        if is_there and not may_be_there and targets is not None:
            findings.add(f"{name}.bias", f"is there, but bias is {bias!r:.20}")
        if may_be_there and not is_there and module.bias is not None and not findings.mismatched:
            findings.add(f"{name}.bias", f"is missing; bias is {bias!r:.20}")


def _check_budget(path: str, tensors: LoraTensors, max_rank: int | None) -> None:
    ranks = {roles[A].shape[0] for roles in tensors.values() if A in roles}
    if max_rank is not None and max(ranks, default=0) > max_rank:
        raise BudgetExceededError(
            f"adapter {path!r} has rank {max(ranks)}, the server allows {max_rank}",
            metadata={"path": path, "rank": str(max(ranks)), "max_rank": str(max_rank)},
        )
