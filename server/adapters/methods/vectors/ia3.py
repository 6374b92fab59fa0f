"""IA3 (arXiv 2205.05638): learned vectors that scale what a module gives or takes.

A feed-forward module takes ``l ⊙ x`` (input gain). Any other gives ``l ⊙ (W x + b)``: a gain on the
bias-free result, and ``(l − 1) ⊙ b`` added to the bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.config.pattern_match import Pattern, match_all
from turret.server.adapters.peft_format.config.rules import Irrelevant, Rules, Used
from turret.server.adapters.peft_format.config.selection_rules import CONV1D_RULES, SELECTION_RULES
from turret.server.adapters.peft_format.config.targets import is_optional_module_selector
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)

_ROLE = "ia3_l"


def _is_feedforward_selector(value: Any) -> str | None:
    if value is None:
        return "must be a list of module names (it may be empty) or a regular expression"
    return is_optional_module_selector(value)


IA3_RULES: Rules = {
    **SELECTION_RULES,
    **CONV1D_RULES,
    "feedforward_modules": Used(_is_feedforward_selector),
    "init_ia3_weights": Irrelevant("sets the starting point of training"),
}


def _check(name: str, roles: Roles, module: BaseModule, _rank: int, findings: Findings) -> None:
    shapes = (module.out_features, 1), (1, module.in_features)
    findings.check_shape(f"{name}.{_ROLE}", roles[_ROLE], *shapes)


_FORMAT = ModuleFormat(rules=IA3_RULES, roles={f".{_ROLE}": _ROLE}, check=_check, rank_key=None)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    findings = Findings(checkpoint.path, base.name)
    is_feedforward = _feedforward(checkpoint.config, list(found.modules), findings)
    operators = {}
    for name, roles in found.modules.items():
        module, vector = base.modules[name], roles[_ROLE]
        shape = (1, module.in_features) if name in is_feedforward else (module.out_features, 1)
        if tuple(vector.shape) != shape:
            # A vector for the other side: the config and the tensor tell different stories.
            why = f"has shape {list(vector.shape)}, by feedforward_modules it is {list(shape)}"
            findings.add(f"{name}.{_ROLE}", why)
            continue
        operators[name] = _operators(vector, module, name in is_feedforward)
    findings.raise_if_any()
    depends_on_base = any(o.bias is not None for o in operators.values())
    return finish(checkpoint, base, operators, found=found, depends_on_base=depends_on_base)


def _feedforward(config: Mapping[str, Any], names: list[str], findings: Findings) -> frozenset[str]:
    """The modules whose input is scaled, by PEFT's rule: a listed name is any ending."""
    if "feedforward_modules" not in config:
        findings.add("feedforward_modules", "is required")
        return frozenset()
    chosen = config["feedforward_modules"]
    if not isinstance(chosen, str):
        return frozenset(name for name in names if name.endswith(tuple(chosen)))
    (result,) = match_all([Pattern("fullmatch", chosen, chosen)], names)
    if result.error is not None:
        findings.add("feedforward_modules", f"{chosen!r:.120} {result.error}")
    return frozenset(
        name for name, hit in zip(names, result.matches, strict=True) if hit is not None
    )


def _operators(vector: torch.Tensor, module: BaseModule, is_feedforward: bool) -> ModuleOperators:
    gain = vector.reshape(-1).to(torch.float32)
    if is_feedforward:
        return ModuleOperators(input_gain=gain)
    if module.bias is None:
        return ModuleOperators(gain=gain)
    return ModuleOperators(gain=gain, bias=(gain - 1.0) * module.bias.to(torch.float32).cpu())


METHOD = Method("ia3", {"IA3"}, IA3_RULES, lower)
