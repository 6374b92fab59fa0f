"""LN tuning (arXiv 2312.11420): new weights for the norms.

A norm's weight multiplies the input of its linear modules, so a new weight is an input gain ``w' /
w`` of each of them: of q, k and v, of gate and up, or of the head.
"""

from __future__ import annotations

from turret.server.adapters.adapter import TENSORS_FILE
from turret.server.adapters.base import BaseNorm
from turret.server.adapters.checkpoint import Findings
from turret.server.adapters.methods.kit import *
from turret.server.adapters.peft_format.linear_format import SELECTION
from turret.server.adapters.peft_format.targets import resolve_targets

_SUFFIX = ".ln_tuning_layers.weight"


def _check(reading: Reading) -> None:
    """Checks only that there are tensors; the base's norms are known only after it is read."""
    if not reading.checkpoint.tensors:
        reading.fault(TENSORS_FILE, say("NO_TENSORS"))


def _lower(reading: Reading) -> Lowered:
    base, findings = reading.model, reading.findings
    assembly = Assembly(base.dtype)
    left = dict(reading.checkpoint.tensors)
    for name in sorted(_targeted(reading)):
        field = name + _SUFFIX
        weight, norm = left.pop(field, None), base.norms.get(name)
        if weight is None:
            findings.add(field, say("MISSING_TENSOR", by="target_modules"))
        elif norm is not None and findings.check_shape(field, weight, tuple(norm.weight.shape)):
            gain = _gain(field, weight, norm, findings)
            for path in norm.feeds:
                assembly.add(path, InputGain(gain))
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
    # A merge changes no norm, so the gains stay correct.
    return finish(reading, assembly.modules())


def _targeted(reading: Reading) -> frozenset[str]:
    """The norms that the config names."""
    base, config = reading.model, reading.config
    selection = {key: config[key] for key in METHOD.keys if key in config}
    others = [*sorted(base.other_modules), *base.modules]
    findings, prefix = reading.findings, base.text_prefix
    targeted = resolve_targets(selection, [], others, findings, prefix).targeted
    for name in sorted(targeted - base.norms.keys()):
        reading.fault("target_modules", say("NOT_ADAPTABLE", module=name, method=METHOD.name))
    return targeted & base.norms.keys()


def _gain(field: str, weight: torch.Tensor, norm: BaseNorm, findings: Findings) -> torch.Tensor:
    served = norm.weight + norm.offset
    if not bool(served.all()):
        findings.mismatch(field, say("ZERO_BASE_WEIGHT"))
    return (weight.to(torch.float32) + norm.offset) / served


METHOD = Method(
    name="ln_tuning",
    peft_types={"LN_TUNING"},
    keys={key: SELECTION[key] for key in ("target_modules", "exclude_modules", "modules_to_save")},
    required=("target_modules",),
    check=_check,
    lower=_lower,
)
