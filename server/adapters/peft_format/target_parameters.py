"""LoRA on parameters by name (``target_parameters``): of linear modules, it is plain LoRA."""

from __future__ import annotations

from dataclasses import replace

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint

_KEY = "target_parameters"
# Keys that PEFT does not apply to parameters, or refuses beside them.
_ALONE = (
    *("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "lora_bias", "use_dora", "use_bdlora", "use_qalora"),
    *("kasa_config", "velora_config", "monteclora_config", "alora_invocation_tokens"),
)


def name_modules(
    checkpoint: AdapterCheckpoint, base: BaseModel, findings: Findings
) -> AdapterCheckpoint:
    """The checkpoint with ``target_modules`` naming the modules whose weights are targeted.

    A parameter that is no linear module's weight is a fault, and so are keys beside it that would
    choose otherwise. A malformed list is left to the rules.
    """
    config = checkpoint.config
    targets, modules = config.get(_KEY), config.get("target_modules")
    if not targets or not isinstance(targets, list):
        if modules == []:
            findings.add("target_modules", "is empty, and there are no target_parameters")
        return checkpoint
    if modules:
        findings.add("target_modules", "must be empty beside target_parameters")
    for key in _ALONE:
        if config.get(key):
            findings.add(key, "cannot be combined with target_parameters")
    if config.get("bias", "none") != "none":
        findings.add("bias", "cannot be combined with target_parameters")
    chosen: dict[str, None] = {}
    for target in targets:
        ending = f".{target}"
        hits = [name for name in base.modules if f".{name}.weight".endswith(ending)]
        if not hits:
            findings.add(_KEY, f"{target!r:.120} is no weight of a linear module")
        chosen |= dict.fromkeys(hits)
    return replace(checkpoint, config={**config, "target_modules": list(chosen)})
