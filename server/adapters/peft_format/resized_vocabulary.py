"""Checkpoints trained with another number of tokens than the base has (resized embeddings).

``resize_token_embeddings`` adds rows for new tokens, or removes rows that pad the base's
vocabulary, and may pad it again. The file's rows for the base's tokens are cut to the base's size,
so that all later code reads it like any checkpoint; rows beyond that are the adapter's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from turret.lazy_torch import torch
from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.operators.vocabulary import EMBEDDING, HEAD, AddedRows
from turret.server.adapters.peft_format.reading import dora_gain
from turret.server.adapters.peft_format.targets import Targets
from turret.server.adapters.peft_format.vocabulary_checkpoint import (
    BY_NAME,
    FROZEN,
    MAGNITUDE,
    ROWS,
    WHOLE,
    A,
    B,
    Found,
    changed_rows,
    saved_modules,
    tied_targets,
    trained_ids,
    vocabulary_targets,
    without_wrappers,
)
from turret.server.words import say

# Maximum number of rows beyond the base's, which take memory and an extra product in every step.
MAX_ADDED_ROWS = 4096
_HEAD_A, _HEAD_B = f"{HEAD}.lora_A.weight", f"{HEAD}.lora_B.weight"
_HEAD_BIAS = f"{HEAD}.lora_B.bias"
_HEAD_MAGNITUDES = (f"{HEAD}.lora_magnitude_vector", f"{HEAD}.lora_magnitude_vector.weight")


@dataclass(slots=True)
class _Parts:
    """The contents of a file that concern the vocabulary.

    Attributes:
        found: The tensors by module and role.
        ids: Tokens with trained rows, by module, in the order of the rows.
        tensors: Everything, by name.
    """

    tensors: Mapping[str, torch.Tensor]
    found: dict[str, Found] = field(default_factory=dict)
    ids: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], base: BaseModel
    ) -> _Parts:
        found: dict[str, Found] = {EMBEDDING: {}, HEAD: {}}
        for name, tensor in tensors.items():
            module, role = BY_NAME.get(name, (None, None))
            # Skip tensors with another number of dimensions; the code that reads them reports them.
            is_sound = tensor.ndim == 2 or role == MAGNITUDE
            if module is not None and role is not None and is_sound:
                found[module].setdefault(role, (name, tensor))
        return cls(tensors, found, trained_ids(config, base) or {})

    def tensor(self, module: str, role: str) -> torch.Tensor | None:
        return self.found[module].get(role, (None, None))[1]

    def sizes(self) -> dict[str, int]:
        """The number of vocabulary rows according to each tensor that determines it."""
        sizes: dict[str, int] = {}
        for roles in self.found.values():
            for role, (name, tensor) in roles.items():
                if role in (WHOLE, FROZEN):
                    sizes[name] = tensor.shape[0]
                elif role == A:
                    sizes[name] = tensor.shape[1]
        update = self.tensors.get(_HEAD_B)
        if update is not None and update.ndim == 2:
            sizes[_HEAD_B] = update.shape[0]
        return sizes


def vocabulary_of(checkpoint: AdapterCheckpoint, base: BaseModel) -> tuple[int, bool]:
    """The size of a checkpoint's vocabulary, reading no more of it than necessary.

    Returns:
        The number of its rows, 0 if that is the base's or unknown; and whether it may have tokens
        that the base's tokenizer lacks.
    """
    vocabulary = base.vocabulary
    tensors = without_wrappers(checkpoint.tensors, Findings(""))
    parts = _Parts.of(checkpoint.config, tensors, base)
    sizes = set(parts.sizes().values())
    most = max((max(ids, default=-1) for ids in parts.ids.values()), default=-1)
    if sizes - {vocabulary.size} or most >= vocabulary.size:
        return max(sizes | {most + 1}), True
    named = vocabulary.size if vocabulary.named is None else vocabulary.named
    if named >= vocabulary.size:
        return 0, False
    a = parts.tensor(EMBEDDING, A)
    if most >= named or (a is not None and bool(a[:, named:].any())):
        return 0, True
    saved = saved_modules(checkpoint.config, base)
    for module, served in ((EMBEDDING, vocabulary.embedding), (HEAD, vocabulary.head)):
        whole = parts.tensor(module, WHOLE) if module in saved else None
        if whole is None or whole.shape != served.shape:
            continue
        if len(changed_rows(whole[named:], served[named:])):
            return 0, True
    return 0, False


def fit_vocabulary(
    checkpoint: AdapterCheckpoint, base: BaseModel, findings: Findings
) -> tuple[AdapterCheckpoint, AddedRows | None, int]:
    """Cuts a checkpoint to the base's vocabulary. Raises nothing; problems are in the findings.

    Returns:
        The checkpoint; its rows behind the base's, or None; and the number of rows with which it
        was trained, 0 if that is the base's.
    """
    tensors = without_wrappers(checkpoint.tensors, findings)
    checkpoint = replace(checkpoint, tensors=tensors)
    parts = _Parts.of(checkpoint.config, tensors, base)
    size = _size(parts, base, findings)
    if not size:
        return checkpoint, None, 0
    added = None
    if size > base.vocabulary.size:
        added = _added(parts, checkpoint.config, size, base, findings)
    return _cut(parts, checkpoint, base), added, size


def _size(parts: _Parts, base: BaseModel, findings: Findings) -> int:
    """Rows of the vocabulary; 0 if they are the base's, or something is wrong."""
    own, sizes = base.vocabulary.size, parts.sizes()
    most = max((max(ids, default=-1) for ids in parts.ids.values()), default=-1)
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
    if parts.tensor(EMBEDDING, MAGNITUDE) is not None:
        findings.mismatch(parts.found[EMBEDDING][MAGNITUDE][0], say("NEEDS_ALL_TOKENS"))
        return 0
    return size


def _added(
    parts: _Parts, config: Mapping[str, Any], size: int, base: BaseModel, findings: Findings
) -> AddedRows | None:
    """The rows behind the base's, with the values in the trained model's embedding and head."""
    first = base.vocabulary.size
    targets = vocabulary_targets(config, base)
    embedding = _rows_of(EMBEDDING, parts, size, base)
    head = _rows_of(HEAD, parts, size, base)
    if head is None and base.vocabulary.is_tied:
        # A tied head shares the embedding's original rows, before any adapter changed them.
        role = FROZEN if parts.tensor(EMBEDDING, FROZEN) is not None else WHOLE
        is_trained = role == WHOLE and EMBEDDING in saved_modules(config, base)
        frozen = None if is_trained else parts.tensor(EMBEDDING, role)
        head = None if frozen is None else frozen[first:]
    if head is None and config.get("task_type") == "SEQ_CLS":
        # A classifier generates no tokens, so the embedding can stand in for the head.
        head = embedding
    if embedding is not None and targets is not None:
        embedding = _with_update(embedding, parts, targets, first)
    if head is not None:
        head = _with_head_update(head, parts, config, targets, base, findings)
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


def _rows_of(module: str, parts: _Parts, size: int, base: BaseModel) -> torch.Tensor | None:
    """The added rows of a matrix before LoRA: saved, trained alone, or frozen; None if unknown."""
    first = base.vocabulary.size
    whole = parts.tensor(module, WHOLE)
    matrix = parts.tensor(module, FROZEN) if whole is None else whole
    rows = None if matrix is None else matrix[first:]
    trained, ids = parts.tensor(module, ROWS), parts.ids.get(module)
    if trained is None and module == HEAD and ids == parts.ids.get(EMBEDDING):
        trained = parts.tensor(EMBEDDING, ROWS)
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


def _with_update(rows: torch.Tensor, parts: _Parts, targets: Targets, first: int) -> torch.Tensor:
    """Applies LoRA to the embedding, ``e(t) + s A[t] B``; wrong shapes are reported elsewhere."""
    a, b = parts.tensor(EMBEDDING, A), parts.tensor(EMBEDDING, B)
    if a is None or b is None or EMBEDDING not in targets.targeted:
        return rows
    if a.shape[0] != b.shape[1] or b.shape[0] != rows.shape[1]:
        return rows
    wide = torch.promote_types(rows.dtype, torch.float32)
    update = a[:, first:].T.to(wide) @ b.T.to(wide)
    return rows.to(wide) + targets.scaling(EMBEDDING) * update


def _with_head_update(
    rows: torch.Tensor,
    parts: _Parts,
    config: Mapping[str, Any],
    targets: Targets | None,
    base: BaseModel,
    findings: Findings,
) -> torch.Tensor:
    """Applies LoRA or DoRA to the head: ``g_t (h_t + s B_t A)``; shapes are checked elsewhere."""
    a, b = parts.tensors.get(_HEAD_A), parts.tensors.get(_HEAD_B)
    if targets is not None and (implied := tied_targets(config, targets, base)):
        targets = vocabulary_targets({**config, **implied}, base)
    if a is None or b is None or targets is None or HEAD not in targets.targeted:
        return rows
    if _HEAD_BIAS in parts.tensors:
        findings.mismatch(_HEAD_BIAS, say("NEEDS_ALL_TOKENS"))
    if not a.ndim == b.ndim == 2 or (a.shape[0], a.shape[1]) != (b.shape[1], rows.shape[1]):
        return rows
    first = base.vocabulary.size
    wide = torch.promote_types(rows.dtype, torch.float32)
    scaling = targets.scaling(HEAD)
    merged = rows.to(wide) + scaling * (b[first:].to(wide) @ a.to(wide))
    for name in _HEAD_MAGNITUDES:
        magnitude = parts.tensors.get(name)
        if magnitude is not None and magnitude.numel() == b.shape[0]:
            gain = dora_gain(magnitude.reshape(-1)[first:], a, b[first:], scaling, rows.to(wide))
            merged = merged * gain.to(wide)[:, None]
    return merged


def _cut(parts: _Parts, checkpoint: AdapterCheckpoint, base: BaseModel) -> AdapterCheckpoint:
    """The checkpoint with as many rows as the base: cut, or filled up with the base's own."""
    first = base.vocabulary.size
    served = {EMBEDDING: base.vocabulary.embedding, HEAD: base.vocabulary.head}
    tensors = dict(checkpoint.tensors)
    for module, roles in parts.found.items():
        for role, (name, tensor) in roles.items():
            if role in (WHOLE, FROZEN):
                tensors[name] = _fitted(tensor, first, served[module])
            elif role == A:
                tensors[name] = _fitted(tensor.T, first).T
    for name in (_HEAD_B, _HEAD_BIAS, *_HEAD_MAGNITUDES):
        if name in tensors and tensors[name].ndim > 0:
            tensors[name] = _fitted(tensors[name], first)
    config, is_partial = dict(checkpoint.config), checkpoint.is_partial
    for module in (HEAD, EMBEDDING):
        ids = parts.ids.get(module)
        if ids is None or all(token < first for token in ids):
            continue
        kept = [number for number, token in enumerate(ids) if token < first]
        name, rows = parts.found[module].get(ROWS, ("", None))
        tensors.pop(name, None)
        if rows is not None and kept and len(rows) == len(ids):
            tensors[name] = rows[kept]
        is_partial = True
    config = _with_ids_below(config, first)
    return replace(checkpoint, tensors=tensors, config=config, is_partial=is_partial)


def _fitted(tensor: torch.Tensor, size: int, served: torch.Tensor | None = None) -> torch.Tensor:
    """The first ``size`` rows; if there are too few, served rows or zeros follow."""
    if len(tensor) >= size:
        return tensor[:size]
    if served is None or served.shape[1:] != tensor.shape[1:]:
        behind = tensor.new_zeros(size - len(tensor), *tensor.shape[1:])
    else:
        behind = served[len(tensor) :].to(tensor)
    return torch.cat((tensor, behind))


def _with_ids_below(config: dict[str, Any], size: int) -> dict[str, Any]:
    """The config without tokens beyond the base's; entries that become empty are removed."""
    value = config.get("trainable_token_indices")
    if isinstance(value, list):
        config["trainable_token_indices"] = [i for i in value if i < size] or None
    elif isinstance(value, Mapping):
        below = {name: [i for i in ids if i < size] for name, ids in value.items()}
        config["trainable_token_indices"] = {n: ids for n, ids in below.items() if ids} or None
    alone = config.get("token_indices")
    if isinstance(alone, list):
        config["token_indices"] = [i for i in alone if i < size]
        if not config["token_indices"]:
            del config["token_indices"]
    return config
