"""Trainable tokens (PEFT's ``TRAINABLE_TOKENS``): only some rows of the embedding are trained.

``e(t)`` is the file's row for the config's tokens. With tied embeddings they are rows of the output
head too; PEFT then saves them under both names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turret.server.adapters.adapter import TENSORS_FILE
from turret.server.adapters.base import BaseModel, BaseSizes
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.lowering.lowered import Lowered, finish
from turret.server.adapters.methods.kit import *
from turret.server.adapters.operators.vocabulary import (
    EMBEDDING,
    HEAD,
    VocabularyOperators,
    VocabularyRows,
)
from turret.server.adapters.peft_format.config_rules import is_token_list
from turret.server.adapters.peft_format.refusals import unknown_tensors
from turret.server.adapters.peft_format.targets import resolve_targets
from turret.server.adapters.peft_format.vocabulary_checkpoint import read_rows

_SUFFIX = ".trainable_tokens_delta"
# Where PEFT wraps a tied head twice, it saves the same rows a second time.
_COPIES = (f"{HEAD}{_SUFFIX}", f"{HEAD}.base_layer{_SUFFIX}")


def check(checkpoint: AdapterCheckpoint, base: BaseModel | BaseSizes) -> None:
    """Checks only the config; reading the tensors compares the rows with the base's."""
    _check_config(checkpoint, base).raise_if_any()


def _check_config(checkpoint: AdapterCheckpoint, base: BaseModel | BaseSizes) -> Findings:
    findings = Findings(checkpoint.path, base.name)
    METHOD.check_config(checkpoint.config, findings)
    if "token_indices" not in checkpoint.config and not checkpoint.is_partial:
        findings.add("token_indices", say("REQUIRED"))
    if not checkpoint.tensors and not checkpoint.is_partial:
        findings.add(TENSORS_FILE, say("NO_TENSORS"))
    return findings


def lower(checkpoint: AdapterCheckpoint, base: BaseModel, *_: object) -> Lowered:

    findings = _check_config(checkpoint, base)
    targeted = _targeted(checkpoint.config, base, findings)
    rows = _read(checkpoint, targeted, base, findings)
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
        findings.add("target_modules", say("NOT_ADAPTABLE", module=name, method=METHOD.name))
    if not targeted:
        findings.add("target_modules", say("SELECTS_NOTHING"))
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
                continue  # the adapter has rows of added tokens only
            if tensor is None:
                findings.add(name, say("MISSING_TENSOR", by="target_modules"))
            elif "token_indices" not in findings.fields:
                ids = checkpoint.config.get("token_indices", [])
                found = read_rows(name, tensor, ids, base.vocabulary, findings)
                if found is not None:
                    rows[module] = found
    unknown_tensors(left, findings)
    return rows


def _drop_copies(
    left: dict[str, torch.Tensor], shared: torch.Tensor | None, findings: Findings
) -> None:
    for name in _COPIES:
        copy = left.pop(name, None)
        if copy is not None and (shared is None or not torch.equal(copy, shared)):
            findings.add(name, say("DIFFERENT_COPY", other=EMBEDDING + _SUFFIX))


METHOD = Method(
    name="trainable_tokens",
    peft_types={"TRAINABLE_TOKENS"},
    keys={"token_indices": is_token_list, "target_modules": is_optional_module_selector},
    ignored={"init_weights": START},
    check=check,
    lower=lower,
)
