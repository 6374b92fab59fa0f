"""LN tuning (arXiv 2312.11420): new weights for the norms.

A norm's weight multiplies the input of its linear modules, so a new one is an input gain ``w' / w``
of each of them: of q, k and v, of gate and up, or of the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turret.server.adapters.adapter import TENSORS_FILE
from turret.server.adapters.base import BaseModel, BaseNorm, BaseSizes
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.lowering.lowered import Lowered, finish
from turret.server.adapters.methods.kit import *
from turret.server.adapters.peft_format.targets import resolve_targets

_SUFFIX = ".ln_tuning_layers.weight"


def _check_config(checkpoint: AdapterCheckpoint, base: BaseModel | BaseSizes) -> Findings:
    findings = Findings(checkpoint.path, base.name)
    METHOD.check_config(checkpoint.config, findings)
    if "target_modules" not in checkpoint.config:
        findings.add("target_modules", say("REQUIRED"))
    if not checkpoint.tensors:
        findings.add(TENSORS_FILE, say("NO_TENSORS"))
    return findings


def check(checkpoint: AdapterCheckpoint, base: BaseModel | BaseSizes) -> None:
    """Checks only the config, because the base's norms are known only after it is read."""
    _check_config(checkpoint, base).raise_if_any()


def lower(checkpoint: AdapterCheckpoint, base: BaseModel, *_: object) -> Lowered:

    findings = _check_config(checkpoint, base)
    targeted = _targeted(checkpoint.config, base, findings)
    assembly = Assembly(base.dtype)
    left = dict(checkpoint.tensors)
    for name in sorted(targeted):
        field = name + _SUFFIX
        weight, norm = left.pop(field, None), base.norms.get(name)
        if weight is None:
            findings.add(field, say("MISSING_TENSOR", by="target_modules"))
        elif norm is not None and findings.check_shape(field, weight, tuple(norm.weight.shape)):
            gain = _gain(field, weight, norm, findings)
            for path in norm.feeds:
                assembly.add(path, input_gain(gain))
    for name in left:
        module = name.removesuffix(_SUFFIX)
        if not name.endswith(_SUFFIX):
            findings.add(name, say("UNKNOWN_TENSOR"))
        elif module in base.norms:
            findings.add(name, say("UNEXPECTED_TENSOR", by="target_modules"))
        elif module in base.other_modules or module in base.modules:
            findings.add(name, say("NOT_ADAPTABLE", module=module, method=METHOD.name))
        else:
            findings.mismatch(name, say("NO_SUCH_MODULE", module=module))
    findings.raise_if_any()
    return finish(checkpoint, base, assembly.modules())


def _targeted(config: Mapping[str, Any], base: BaseModel, findings: Findings) -> frozenset[str]:
    """The norms that the config names."""
    if findings.fields & {"target_modules", "exclude_modules"}:
        return frozenset()
    keys = {"target_modules", "exclude_modules"} & config.keys()
    selection = {**{key: config[key] for key in keys}, "r": 1, "lora_alpha": 1}
    others = [*sorted(base.other_modules), *base.modules]
    targeted = resolve_targets(selection, [], others, findings, base.text_prefix).targeted
    for name in sorted(targeted - base.norms.keys()):
        findings.add("target_modules", say("NOT_ADAPTABLE", module=name, method=METHOD.name))
    return targeted & base.norms.keys()


def _gain(field: str, weight: torch.Tensor, norm: BaseNorm, findings: Findings) -> torch.Tensor:
    served = norm.weight + norm.offset
    if not bool(served.all()):
        findings.mismatch(field, say("ZERO_BASE_WEIGHT"))
    return (weight.to(torch.float32) + norm.offset) / served


METHOD = Method(name="ln_tuning", peft_types={"LN_TUNING"}, keys=EXCLUDE, check=check, lower=lower)
