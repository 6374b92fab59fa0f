"""Sorts the tensors of a PEFT LoRA file by module and role; nothing may be left over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from turret.server.adapters.base import BaseModel
from turret.server.adapters.violations import Violations

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


@dataclass(slots=True)
class LoraTensors:
    """Tensors per module path and role, plus what does not fit this base model.

    Attributes:
        modules: ``{module path: {role: tensor}}``; only modules of ``base.modules``.
        mismatches: ``(tensor or module name, why)`` that point at another base model.
    """

    modules: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    mismatches: list[tuple[str, str]] = field(default_factory=list)


def sort_tensors(
    tensors: Mapping[str, torch.Tensor], base: BaseModel, violations: Violations
) -> LoraTensors:
    """Gives every tensor a module and a role, or a violation, or a mismatch."""
    result = LoraTensors()
    for name, tensor in tensors.items():
        module, role = _split(name)
        if role is None:
            violations.add(name, _advice(name))
        elif module in base.other_modules:
            violations.add(name, f"{module!r} cannot be adapted by this version")
        elif module not in base.modules:
            result.mismatches.append((name, f"the base model has no module {module!r}"))
        elif role in result.modules.setdefault(module, {}):
            violations.add(name, f"is a second {role} of {module!r}")
        else:
            result.modules[module][role] = tensor
    for module, roles in result.modules.items():
        _check_shapes(module, roles, base, violations, result.mismatches)
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
    violations: Violations,
    mismatches: list[tuple[str, str]],
) -> None:
    module = base.modules[name]
    a, b = roles.get(A), roles.get(B)
    if (a is None) != (b is None):
        missing = "lora_A" if a is None else "lora_B"
        violations.add(f"{name}.{missing}.weight", "is missing; its partner is there")
    if a is None and b is None and {LORA_BIAS, MAGNITUDE} & roles.keys():
        violations.add(f"{name}.lora_A.weight", "is missing; other LoRA tensors are there")
    for role, tensor in ((A, a), (B, b)):
        if tensor is not None and tensor.ndim != 2:
            violations.add(f"{name}.{role}.weight", f"must be 2-D, not {list(tensor.shape)}")
            return
    if a is not None and b is not None:
        if a.shape[0] != b.shape[1]:
            violations.add(
                f"{name}.lora_B.weight", f"has rank {b.shape[1]}, lora_A has {a.shape[0]}"
            )
        if a.shape[1] != module.in_features or b.shape[0] != module.out_features:
            adapter = f"{a.shape[1]} -> {b.shape[0]}"
            served = f"{module.in_features} -> {module.out_features}"
            mismatches.append((name, f"the adapter maps {adapter}, the base model {served}"))
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
            mismatches.append((f"{name} {role}", f"has shape {shape}, the base has {out} outputs"))
    if BIAS in roles and module.bias is None:
        mismatches.append((f"{name} bias", "the base model has no bias there"))
