"""Checkpoints whose number of tokens differs from the base's (resized embeddings).

``resize_token_embeddings`` adds rows for new tokens, or removes rows that pad the base's
vocabulary, and may pad it again. The file's rows for the base's tokens are cut to the base's size,
so that all later code reads it like any checkpoint; rows beyond that are the adapter's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turret.lazy_torch import torch
from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.operators.vocabulary import EMBEDDING, HEAD, AddedRows
from turret.server.adapters.peft_format.reading import dora_gain
from turret.server.adapters.peft_format.targets import Targets
from turret.server.adapters.peft_format.vocabulary_checkpoint import (
    FROZEN,
    MAGNITUDE,
    ROWS,
    WHOLE,
    A,
    B,
    VocabularyPart,
    changed_rows,
    vocabulary_targets,
)
from turret.server.words import say

# Maximum number of rows after the base's. They take memory and an extra product in every step.
MAX_ADDED_ROWS = 4096
_HEAD_A, _HEAD_B = f"{HEAD}.lora_A.weight", f"{HEAD}.lora_B.weight"
_HEAD_BIAS = f"{HEAD}.lora_B.bias"
_HEAD_MAGNITUDES = (f"{HEAD}.lora_magnitude_vector", f"{HEAD}.lora_magnitude_vector.weight")


def _sizes(part: VocabularyPart) -> dict[str, int]:
    """The number of vocabulary rows according to each tensor that determines it."""
    sizes: dict[str, int] = {}
    for module, roles in part.found.items():
        for role, (name, _) in roles.items():
            if role in (WHOLE, FROZEN, A) and (tensor := part.tensor(module, role)) is not None:
                sizes[name] = tensor.shape[1 if role == A else 0]
    update = part.rest.get(_HEAD_B)
    if update is not None and update.ndim == 2:
        sizes[_HEAD_B] = update.shape[0]
    return sizes


def _largest_id(part: VocabularyPart) -> int:
    """The largest id of a token with a trained row; -1 if there is none."""
    return max((max(ids, default=-1) for ids in (part.ids or {}).values()), default=-1)


def vocabulary_of(checkpoint: AdapterCheckpoint, base: BaseModel) -> tuple[int, bool]:
    """The size of a checkpoint's vocabulary, from as few of its tensors as possible.

    The loader calls this before ``fit_vocabulary``, which checks the size, to decide whether the
    adapter needs its own tokenizer.

    Returns:
        The number of its rows, or 0 if it equals the base's or is unknown; and whether it may have
        tokens that the base's tokenizer lacks.
    """
    vocabulary = base.vocabulary
    part = VocabularyPart.of(checkpoint, base, Findings(""))
    sizes, most = set(_sizes(part).values()), _largest_id(part)
    if sizes - {vocabulary.size} or most >= vocabulary.size:
        return max(sizes | {most + 1}), True
    named = vocabulary.size if vocabulary.named is None else vocabulary.named
    if named >= vocabulary.size:
        return 0, False
    a = part.tensor(EMBEDDING, A)
    if most >= named or (a is not None and bool(a[:, named:].any())):
        return 0, True
    for module, served in ((EMBEDDING, vocabulary.embedding), (HEAD, vocabulary.head)):
        whole = part.tensor(module, WHOLE) if module in part.saved else None
        if whole is None or whole.shape != served.shape:
            continue
        if len(changed_rows(whole[named:], served[named:])):
            return 0, True
    return 0, False


def fit_vocabulary(
    part: VocabularyPart, config: Mapping[str, Any], base: BaseModel, findings: Findings
) -> tuple[AddedRows | None, int]:
    """Cuts a checkpoint's part to the base's vocabulary. Problems are added to the findings.

    Returns:
        The rows after the base's, or None; and the number of rows with which it was trained, or 0
        if it equals the base's.
    """
    size = _size(part, base, findings)
    if not size:
        return None, 0
    added = None
    if size > base.vocabulary.size:
        added = _added(part, config, size, base, findings)
    _cut(part, base)
    return added, size


def _size(part: VocabularyPart, base: BaseModel, findings: Findings) -> int:
    """The number of rows in the vocabulary; 0 if it equals the base's, or if something is wrong."""
    own, sizes, most = base.vocabulary.size, _sizes(part), _largest_id(part)
    found = set(sizes.values()) or {max(own, most + 1)}
    if found == {own} and most < own:
        return 0
    name = next((n for n, rows in sizes.items() if rows != own), "trainable_token_indices")
    if len(found) > 1:
        other, expected = next((n, rows) for n, rows in sizes.items() if rows != sizes[name])
        findings.add(name, say("UNEQUAL_ROWS", rows=sizes[name], other=other, expected=expected))
        return 0
    size = found.pop()
    if most >= size:
        why = say("NOT_IN_RANGE", least=0, most=size - 1, value=most)
        findings.add("trainable_token_indices", why)
        return 0
    if size - own > MAX_ADDED_ROWS:
        why = say("TOO_MANY_ADDED_ROWS", rows=size, base_rows=own, most=MAX_ADDED_ROWS)
        findings.mismatch(name, why)
        return 0
    if part.tensor(EMBEDDING, MAGNITUDE) is not None:
        findings.mismatch(part.found[EMBEDDING][MAGNITUDE][0], say("NEEDS_ALL_TOKENS"))
        return 0
    return size


def _added(
    part: VocabularyPart, config: Mapping[str, Any], size: int, base: BaseModel, findings: Findings
) -> AddedRows | None:
    """The rows after the base's, with the values in the trained model's embedding and head."""
    first = base.vocabulary.size
    targets, _ = vocabulary_targets(config, base)
    embedding = _rows_of(EMBEDDING, part, size, base)
    head = _rows_of(HEAD, part, size, base)
    if head is None and base.vocabulary.is_tied:
        # A tied head shares the embedding's original rows, before any adapter changed them.
        role = FROZEN if part.tensor(EMBEDDING, FROZEN) is not None else WHOLE
        is_trained = role == WHOLE and EMBEDDING in part.saved
        frozen = None if is_trained else part.tensor(EMBEDDING, role)
        head = None if frozen is None else frozen[first:]
    if head is None and config.get("task_type") == "SEQ_CLS":
        # A classifier generates no tokens, so the embedding can stand in for the head.
        head = embedding
    if embedding is not None and targets is not None:
        embedding = _with_update(embedding, part, targets, first)
    if head is not None:
        head = _with_head_update(head, part, targets, base, findings)
    for name, rows in ((EMBEDDING, embedding), (HEAD, head)):
        if rows is None:
            why = say("MISSING_ROWS", first=first, last=size - 1, module=name.rpartition(".")[2])
            findings.mismatch(f"{name}.weight", why)
    if embedding is None or head is None:
        return None
    made = {id(t): t.to(base.dtype, copy=True).contiguous() for t in (embedding, head)}
    added = AddedRows(first, made[id(embedding)], made[id(head)])
    shape = size - first, base.hidden_size
    for name, rows in ((EMBEDDING, added.embedding), (HEAD, added.head)):
        if findings.check_shape(f"{name}.weight", rows, shape) and not torch.isfinite(rows).all():
            findings.add(f"{name}.weight", say("NOT_FINITE", dtype=base.dtype))
    return added


def _rows_of(module: str, part: VocabularyPart, size: int, base: BaseModel) -> torch.Tensor | None:
    """The added rows of a matrix before LoRA: saved, trained alone, or frozen; None if unknown."""
    first = base.vocabulary.size
    whole = part.tensor(module, WHOLE)
    matrix = part.tensor(module, FROZEN) if whole is None else whole
    rows = None if matrix is None else matrix[first:]
    wanted = part.ids or {}
    trained, ids = part.tensor(module, ROWS), wanted.get(module)
    if trained is None and module == HEAD and ids == wanted.get(EMBEDDING):
        trained = part.tensor(EMBEDDING, ROWS)
    if trained is None or ids is None or trained.shape != (len(ids), base.hidden_size):
        return rows
    own = [number for number, token in enumerate(ids) if token >= first]
    if rows is None:
        if sorted(ids[number] for number in own) != list(range(first, size)):
            return None
        rows = trained.new_zeros(size - first, base.hidden_size)
    elif rows.shape[1] != base.hidden_size:
        return rows
    places = torch.tensor([ids[number] - first for number in own], dtype=torch.int64)
    return rows.to(trained.dtype).index_copy(0, places, trained[own])


def _with_update(
    rows: torch.Tensor, part: VocabularyPart, targets: Targets, first: int
) -> torch.Tensor:
    """Applies LoRA to the embedding, ``e(t) + s A[t] B``; wrong shapes are reported elsewhere."""
    a, b = part.tensor(EMBEDDING, A), part.tensor(EMBEDDING, B)
    if a is None or b is None or EMBEDDING not in targets.targeted:
        return rows
    if a.shape[0] != b.shape[1] or b.shape[0] != rows.shape[1]:
        return rows
    wide = torch.promote_types(rows.dtype, torch.float32)
    update = a[:, first:].T.to(wide) @ b.T.to(wide)
    return rows.to(wide) + targets.scaling(EMBEDDING) * update


def _with_head_update(
    rows: torch.Tensor,
    part: VocabularyPart,
    targets: Targets | None,
    base: BaseModel,
    findings: Findings,
) -> torch.Tensor:
    """Applies LoRA or DoRA to the head: ``g_t (h_t + s B_t A)``; shapes are checked elsewhere."""
    a, b = part.rest.get(_HEAD_A), part.rest.get(_HEAD_B)
    if a is None or b is None or targets is None or HEAD not in targets.targeted:
        return rows
    if _HEAD_BIAS in part.rest:
        findings.mismatch(_HEAD_BIAS, say("NEEDS_ALL_TOKENS"))
    if not a.ndim == b.ndim == 2 or (a.shape[0], a.shape[1]) != (b.shape[1], rows.shape[1]):
        return rows
    first = base.vocabulary.size
    wide = torch.promote_types(rows.dtype, torch.float32)
    scaling = targets.scaling(HEAD)
    merged = rows.to(wide) + scaling * (b[first:].to(wide) @ a.to(wide))
    for name in _HEAD_MAGNITUDES:
        magnitude = part.rest.get(name)
        if magnitude is not None and magnitude.numel() == b.shape[0]:
            gain = dora_gain(magnitude.reshape(-1)[first:], a, b[first:], scaling, rows.to(wide))
            merged = merged * gain.to(wide)[:, None]
    return merged


def _cut(part: VocabularyPart, base: BaseModel) -> None:
    """Gives the part as many rows as the base has: cuts it, or adds the base's own rows."""
    first = base.vocabulary.size
    served = {EMBEDDING: base.vocabulary.embedding, HEAD: base.vocabulary.head}
    for module, roles in part.found.items():
        for role, (name, tensor) in roles.items():
            if tensor.ndim == 2 and role in (WHOLE, FROZEN):
                roles[role] = name, _fitted(tensor, first, served[module])
            elif tensor.ndim == 2 and role == A:
                roles[role] = name, _fitted(tensor.T, first).T
    for name in (_HEAD_B, _HEAD_BIAS, *_HEAD_MAGNITUDES):
        if name in part.rest and part.rest[name].ndim > 0:
            part.rest[name] = _fitted(part.rest[name], first)
    for module, ids in (part.ids or {}).items():
        kept = [number for number, token in enumerate(ids) if token < first]
        if len(kept) == len(ids):
            continue
        part.is_cut, roles = True, part.found[module]
        if (rows := part.tensor(module, ROWS)) is not None:
            name, _ = roles.pop(ROWS)
            if kept and len(rows) == len(ids):
                roles[ROWS] = name, rows[kept]
        part.ids = {**(part.ids or {}), module: [ids[number] for number in kept]}
    part.ids = part.ids and {module: ids for module, ids in part.ids.items() if ids}


def _fitted(tensor: torch.Tensor, size: int, served: torch.Tensor | None = None) -> torch.Tensor:
    """The first ``size`` rows. If there are too few, served rows or zeros are appended."""
    if len(tensor) >= size:
        return tensor[:size]
    if served is None or served.shape[1:] != tensor.shape[1:]:
        behind = tensor.new_zeros(size - len(tensor), *tensor.shape[1:])
    else:
        behind = served[len(tensor) :].to(tensor)
    return torch.cat((tensor, behind))
