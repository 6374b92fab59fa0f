"""Trainable tokens (PEFT's ``TRAINABLE_TOKENS``): rows of the embedding, trained alone.

``e(t)`` is the file's row for the config's tokens. With tied embeddings they are rows of the output
head too; PEFT then saves them under both names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.module_names import EMBEDDING, HEAD
from turret.server.adapters.operators.vocabulary import VocabularyOperators, VocabularyRows
from turret.server.adapters.peft_format.config.rules import (
    COMMON_RULES,
    Irrelevant,
    Rules,
    Used,
    check_config,
)
from turret.server.adapters.peft_format.config.targets import (
    is_optional_module_selector,
    resolve_targets,
)
from turret.server.adapters.peft_format.config.vocabulary_rules import is_token_list
from turret.server.adapters.peft_format.vocabulary.rows import read_rows
from turret.server.adapters.source import TENSORS_FILE

_SUFFIX = ".trainable_tokens_delta"
# Where PEFT wraps a tied head twice, it saves the same rows once more.
_COPIES = (f"{HEAD}{_SUFFIX}", f"{HEAD}.base_layer{_SUFFIX}")

TRAINABLE_TOKENS_RULES: Rules = {
    **COMMON_RULES,
    "token_indices": Used(is_token_list),
    "target_modules": Used(is_optional_module_selector),
    "init_weights": Irrelevant("sets the starting point of training"),
}


def lower(checkpoint: AdapterCheckpoint, base: BaseModel, *_: object) -> Lowered:
    config, findings = checkpoint.config, Findings(checkpoint.path, base.name)
    check_config(config, TRAINABLE_TOKENS_RULES, findings)
    if "token_indices" not in config and not checkpoint.is_partial:
        findings.add("token_indices", "is required")
    rows = _read(checkpoint, _targeted(config, base, findings), base, findings)
    findings.raise_if_any()
    tokens = VocabularyOperators(embedding=rows.get(EMBEDDING), head=rows.get(HEAD))
    return finish(checkpoint, base, tokens=tokens, depends_on_base=False)


def _targeted(config: Mapping[str, Any], base: BaseModel, findings: Findings) -> frozenset[str]:
    """Modules with trained rows: the embedding unless the config says otherwise."""
    if "target_modules" in findings.fields:
        return frozenset()
    chosen = config.get("target_modules") or [EMBEDDING]
    selection = {"target_modules": chosen, "r": 1, "lora_alpha": 1}
    linear = [name for name in base.modules if name != HEAD]
    others = [HEAD, EMBEDDING, *sorted(base.other_modules - {EMBEDDING})]
    targeted = resolve_targets(selection, linear, others, findings, base.text_prefix).targeted
    for name in sorted(targeted - {EMBEDDING, HEAD}):
        findings.add("target_modules", f"{name!r} has no row per token")
    if not targeted:
        findings.add("target_modules", "selects neither embed_tokens nor lm_head")
    return targeted & {EMBEDDING, HEAD}


def _read(
    checkpoint: AdapterCheckpoint, targeted: frozenset[str], base: BaseModel, findings: Findings
) -> dict[str, VocabularyRows]:
    rows = {}
    left = dict(checkpoint.tensors)
    is_tied = base.vocabulary.is_tied and EMBEDDING in targeted
    for module in (EMBEDDING, HEAD):
        if is_tied and module == HEAD:
            shared = checkpoint.tensors.get(EMBEDDING + _SUFFIX)
            _drop_copies(left, shared, findings)
            if EMBEDDING in rows:
                rows[HEAD] = rows[EMBEDDING]
        elif module in targeted:
            name = module + _SUFFIX
            tensor = left.pop(name, None)
            if tensor is None and checkpoint.is_partial:
                continue  # it has rows of added tokens alone
            if tensor is None:
                findings.add(name, "is missing; the config targets the module")
            elif "token_indices" not in findings.fields:
                ids = checkpoint.config.get("token_indices", [])
                found = read_rows(name, tensor, ids, base.vocabulary, findings)
                if found is not None:
                    rows[module] = found
    for name in left:
        findings.add(name, "is not a tensor this method knows; every tensor must be used")
    if not checkpoint.tensors and not checkpoint.is_partial:
        findings.add(TENSORS_FILE, "holds no tensors of this method")
    return rows


def _drop_copies(
    left: dict[str, torch.Tensor], shared: torch.Tensor | None, findings: Findings
) -> None:
    for name in _COPIES:
        copy = left.pop(name, None)
        if copy is not None and (shared is None or not torch.equal(copy, shared)):
            findings.add(name, "differs from the embedding's rows, which it is tied to")


METHOD = Method("trainable_tokens", {"TRAINABLE_TOKENS"}, TRAINABLE_TOKENS_RULES, lower)
