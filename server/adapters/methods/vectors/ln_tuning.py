"""LN tuning (arXiv 2312.11420): other weights for the norms.

A norm's weight multiplies what its linear modules take, so a new one is an input gain ``w' / w`` of
each of them: of q, k and v, of gate and up, or of the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from turret.server.adapters.base import BaseModel, BaseNorm
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.no_adapter import LEFT_OUT
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.rules import Rules, check_config
from turret.server.adapters.peft_format.config.selection_rules import SELECTION_RULES
from turret.server.adapters.peft_format.config.targets import resolve_targets
from turret.server.adapters.source import TENSORS_FILE

_SUFFIX = ".ln_tuning_layers.weight"

LN_TUNING_RULES: Rules = SELECTION_RULES


def lower(checkpoint: AdapterCheckpoint, base: BaseModel, *_: object) -> Lowered:
    config, findings = checkpoint.config, Findings(checkpoint.path, base.name)
    check_config(config, LN_TUNING_RULES, findings)
    targeted = _targeted(config, base, findings)
    operators: dict[str, ModuleOperators] = {}
    left = dict(checkpoint.tensors)
    for name in sorted(targeted):
        field = name + _SUFFIX
        weight, norm = left.pop(field, None), base.norms.get(name)
        if weight is None:
            findings.add(field, "is missing; the config targets the norm")
        elif norm is not None and findings.check_shape(field, weight, tuple(norm.weight.shape)):
            gain = _gain(field, weight, norm, findings)
            operators |= {path: ModuleOperators(input_gain=gain) for path in norm.feeds}
    for name in left:
        module = name.removesuffix(_SUFFIX)
        if not name.endswith(_SUFFIX):
            findings.add(name, "is not a tensor this method knows; every tensor must be used")
        elif module in base.norms:
            findings.add(name, LEFT_OUT)
        elif module in base.other_modules or module in base.modules:
            findings.add(name, f"{module!r} is no norm that feeds linear modules alone")
        else:
            findings.mismatch(name, f"the base model has no module {module!r}")
    if not checkpoint.tensors:
        findings.add(TENSORS_FILE, "holds no tensors of this method")
    findings.raise_if_any()
    return finish(checkpoint, base, operators)


def _targeted(config: Mapping[str, Any], base: BaseModel, findings: Findings) -> frozenset[str]:
    """The norms that the config names."""
    if "target_modules" not in config:
        findings.add("target_modules", "is required")
    if findings.fields & {"target_modules", "exclude_modules"}:
        return frozenset()
    keys = {"target_modules", "exclude_modules"} & config.keys()
    selection = {**{key: config[key] for key in keys}, "r": 1, "lora_alpha": 1}
    others = [*sorted(base.other_modules), *base.modules]
    targeted = resolve_targets(selection, [], others, findings, base.text_prefix).targeted
    for name in sorted(targeted - base.norms.keys()):
        why = f"{name!r} is no norm that feeds linear modules alone, and cannot be adapted"
        findings.add("target_modules", why)
    return targeted & base.norms.keys()


def _gain(field: str, weight: torch.Tensor, norm: BaseNorm, findings: Findings) -> torch.Tensor:
    served = norm.weight + norm.offset
    if not bool(served.all()):
        findings.mismatch(field, "the base model's own weight is 0 there, which no gain changes")
    return (weight.to(torch.float32) + norm.offset) / served


METHOD = Method("ln_tuning", {"LN_TUNING"}, LN_TUNING_RULES, lower)
