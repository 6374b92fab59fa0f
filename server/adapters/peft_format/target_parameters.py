"""LoRA of parameters chosen by name (``target_parameters``); on linear modules, plain LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from turret.server.adapters.base import BaseModel, BaseSizes
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.peft_format.config.lora_rules import LORA_KEYS
from turret.server.adapters.peft_format.config.rules import Rules, Used, check_config
from turret.server.adapters.peft_format.config.targets import ALL_LINEAR, resolve_targets
from turret.server.words import say

_KEY = "target_parameters"
# Keys that PEFT ignores for parameters, or rejects together with them.
_ALONE = (
    *("exclude_modules", "layers_to_transform", "layers_pattern", "lora_bias", "use_dora"),
    *("use_bdlora", "use_qalora", "kasa_config", "velora_config", "monteclora_config"),
    "alora_invocation_tokens",
)
_PATTERNS = ("rank_pattern", "alpha_pattern")
_SIZES: Rules = {key: Used(LORA_KEYS[key]) for key in ("r", "lora_alpha", *_PATTERNS)}


def name_modules(
    checkpoint: AdapterCheckpoint, base: BaseModel | BaseSizes, findings: Findings
) -> AdapterCheckpoint:
    """The checkpoint with the modules of the targeted weights added to ``target_modules``.

    Reports parameters that are not weights of linear modules, and keys that conflict with
    ``target_parameters``. A malformed list is left to the rules. Parameters of experts have
    already been removed.
    """
    config = checkpoint.config
    targets, modules = config.get(_KEY), config.get("target_modules")
    if not targets or not isinstance(targets, list):
        if modules == [] and not checkpoint.is_partial:
            findings.add("target_modules", say("SELECTS_NOTHING"))
        return checkpoint
    for key in _ALONE:
        if config.get(key):
            findings.add(key, say("CONFLICTS_WITH", other=_KEY))
    if config.get("bias", "none") != "none":
        findings.add("bias", say("CONFLICTS_WITH", other=_KEY))
    chosen: dict[str, None] = {}
    for target in targets:
        ending = f".{target}"
        hits = [name for name in base.modules if f".{name}.weight".endswith(ending)]
        if not hits:
            findings.add(_KEY, say("NO_SUCH_MODULE", module=target))
        chosen |= dict.fromkeys(hits)
    if modules:
        sizes = {"r": 1, "lora_alpha": 1, "target_modules": modules}
        for name in resolve_targets(sizes, list(chosen), (), findings).targeted:
            findings.add("target_modules", say("SELECTED_TWICE", module=name, other=_KEY))
    selected = {"target_modules": _both(modules, list(chosen))}
    changed = {**config, **selected, **_patterns(config, list(chosen), findings)}
    return replace(checkpoint, config=changed)


def _patterns(
    config: Mapping[str, Any], chosen: list[str], findings: Findings
) -> dict[str, dict[str, Any]]:
    """The config's patterns, preceded by one for each chosen module.

    PEFT matches the patterns with a parameter's name, which ends in ``.weight``.
    """
    present = [key for key in _PATTERNS if config.get(key)]
    selection = {key: config.get(key) for key in _SIZES}
    faults = Findings("")
    check_config(selection, _SIZES, faults)
    if not present or faults.fields:
        return {}
    names = [f"{name}.weight" for name in chosen]
    targets = resolve_targets({**selection, "target_modules": names}, names, (), findings)
    tables = {"rank_pattern": targets.ranks, "alpha_pattern": targets.alphas}
    return {
        key: {name: tables[key][f"{name}.weight"] for name in chosen} | config[key]
        for key in present
    }


def _both(modules: object, chosen: list[str]) -> object:
    """A value of ``target_modules`` that selects what ``modules`` does, and the chosen paths."""
    if not modules:
        return chosen
    if isinstance(modules, str) and modules.lower() != ALL_LINEAR:
        return "|".join((f"(?:{modules})", *map(re.escape, chosen)))
    return [*modules, *chosen] if isinstance(modules, list) else modules
