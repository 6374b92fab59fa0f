"""The vocabulary's part of a checkpoint: the embedding, and rows of the head.

Checkpoints of all methods may have this part, in the same form. It is removed first, and the method
reads the rest. The method handles LoRA on ``lm_head``, because the head is a linear module.

Checkpoints may have another number of tokens than the base (resized embeddings).
``resize_token_embeddings`` adds rows for new tokens, or removes rows that pad the base's
vocabulary, and may pad it again. The tensors are cut or filled up to the base's number of rows, so
that all later code reads such a checkpoint like any other. Rows after the base's are the adapter's
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from turret.lazy_torch import torch
from turret.server.adapters.base import BaseModel, BaseVocabulary
from turret.server.adapters.checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.operators.vocabulary import (
    EMBEDDING,
    HEAD,
    AddedRows,
    EmbeddingLowRank,
    VocabularyOperators,
    VocabularyRows,
)
from turret.server.adapters.peft_format.config_rules import (
    fault_of_modules_to_save,
    fault_of_token_indices,
    fault_of_token_list,
    token_ids_by_module,
    vocabulary_module,
)
from turret.server.adapters.peft_format.lora_rules import CHOICE, SIZES, well_formed
from turret.server.adapters.peft_format.reading import dora_gain
from turret.server.adapters.peft_format.targets import (
    Targets,
    fault_of_optional_selector,
    resolve_targets,
)
from turret.server.words import say

WHOLE, FROZEN, ROWS, A, B, MAGNITUDE = "weight", "base", "rows", "a", "b", "magnitude"
_SUFFIXES = {
    # PEFT saves the original matrix with an adapter that targets the module.
    ".base_layer.weight": FROZEN,
    ".weight": WHOLE,
    ".token_adapter.trainable_tokens_delta": ROWS,
    # Trainable tokens, the method that trains only rows, has no ``token_adapter``.
    ".trainable_tokens_delta": ROWS,
    ".lora_embedding_A": A,
    ".lora_embedding_B": B,
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
}
LOW_RANK = (A, B, MAGNITUDE)
_BY_NAME = {
    module + suffix: (module, role)
    for module in (EMBEDDING, HEAD)
    for suffix, role in _SUFFIXES.items()
    if module == EMBEDDING or role not in LOW_RANK
} | {
    # For methods that learn a prompt, PEFT's prefix is only "base_model.", which leaves these
    # names.
    "embed_tokens.weight": (EMBEDDING, WHOLE),
    f"base_model.{HEAD}.weight": (HEAD, WHOLE),
}
# Maps a role to (name in the file, tensor).
FoundTensors = dict[str, tuple[str, "torch.Tensor"]]

# PEFT with ``save_embedding_layers``, which a resized vocabulary sets, also saves the content of
# its wrappers. This maps those additional names to the usual ones.
_WRAPPED = {
    f"{module}{suffix}": f"{module}{usual}"
    for module in (EMBEDDING, HEAD)
    for suffix, usual in (
        (".modules_to_save.weight", ".weight"),
        (".original_module.weight", ".base_layer.weight"),
        (".token_adapter.base_layer.weight", ".base_layer.weight"),
        # PEFT wraps a tied head twice.
        (".base_layer.trainable_tokens_delta", ".trainable_tokens_delta"),
    )
}


def without_wrappers(
    tensors: Mapping[str, torch.Tensor], findings: Findings
) -> Mapping[str, torch.Tensor]:
    """The tensors by their usual names. Reports duplicates that are not equal."""
    if _WRAPPED.keys().isdisjoint(tensors):
        return tensors
    result = {name: tensor for name, tensor in tensors.items() if name not in _WRAPPED}
    for name, usual in _WRAPPED.items():
        if name not in tensors:
            continue
        copy = tensors[name]
        known = result.setdefault(usual, copy)
        is_alike = (known.dtype, known.shape) == (copy.dtype, copy.shape)
        if not is_alike or not torch.equal(known, copy):
            findings.add(name, say("DIFFERENT_COPY", other=usual))
    return result


@dataclass(slots=True)
class VocabularyPart:
    """A checkpoint, split into the vocabulary's part and the rest.

    Attributes:
        found: The tensors of the embedding and of the head, by module and role.
        rest: All other tensors, by name.
        ids: Tokens with trained rows, by module, in the order of the rows; None if a key for this
            is invalid, which the method's rules report.
        saved: The modules that PEFT saves whole.
        is_cut: Whether trained rows of tokens beyond the base's were removed.
    """

    found: dict[str, FoundTensors]
    rest: dict[str, torch.Tensor]
    ids: dict[str, list[int]] | None
    saved: set[str]
    is_cut: bool = False

    @classmethod
    def of(
        cls, checkpoint: AdapterCheckpoint, base: BaseModel, findings: Findings
    ) -> VocabularyPart:
        found: dict[str, FoundTensors] = {EMBEDDING: {}, HEAD: {}}
        rest = {}
        for name, tensor in without_wrappers(checkpoint.tensors, findings).items():
            module, role = _BY_NAME.get(name, (None, None))
            if module is None or role is None:
                rest[name] = tensor
            elif role in found[module]:
                findings.add(name, say("DUPLICATE_TENSOR", other=found[module][role][0]))
            else:
                found[module][role] = (name, tensor)
        config = checkpoint.config
        return cls(found, rest, _trained_ids(config, base), _saved_modules(config, base))

    def tensor(self, module: str, role: str) -> torch.Tensor | None:
        """A tensor; None if it is missing or its number of dimensions is wrong."""
        _, tensor = self.found[module].get(role, ("", None))
        return None if tensor is None or (tensor.ndim != 2 and role != MAGNITUDE) else tensor


# Rows compared at once: 8,192 rows of 4,096 numbers take 128 MB in fp32.
_ROWS_PER_BLOCK = 8192


def check_vocabulary(name: str, rows: int, base: BaseVocabulary, findings: Findings) -> bool:
    """Whether a matrix has one row per token of the base; if not, adds a mismatch."""
    if rows == base.size:
        return True
    findings.mismatch(name, say("WRONG_COUNT", found=rows, what="tokens", expected=base.size))
    return False


def read_rows(
    name: str, tensor: torch.Tensor, ids: list[int], base: BaseVocabulary, findings: Findings
) -> VocabularyRows | None:
    """The trained rows of some tokens, or None if they are invalid.

    The rows of the tensor are in the order of ``ids``.
    """
    over = [i for i in ids if i >= base.size]
    if over:
        why = say("NOT_IN_RANGE", least=0, most=base.size - 1, value=over[0])
        findings.mismatch(name, why)
        return None
    if not findings.check_shape(name, tensor, (len(ids), base.embedding.shape[1])):
        return None
    order = torch.tensor(ids).argsort()
    values = tensor.index_select(0, order).to(base.embedding.dtype).contiguous()
    return _finite(name, VocabularyRows(torch.tensor(ids)[order], values), findings)


def read_matrix(
    name: str,
    tensor: torch.Tensor,
    base_matrix: torch.Tensor,
    base: BaseVocabulary,
    findings: Findings,
) -> VocabularyRows | None:
    """The rows of a whole matrix that differ from the base's; None if none do, or after a fault."""
    if tensor.ndim != 2:
        findings.add(name, say("WRONG_SHAPE", shape=list(tensor.shape), expected="2 dimensions"))
        return None
    if not check_vocabulary(name, tensor.shape[0], base, findings):
        return None
    if not findings.check_shape(name, tensor, tuple(base_matrix.shape)):
        return None
    ids = changed_rows(tensor, base_matrix)
    if not len(ids):
        return None
    # If most rows differ, selecting them costs more than it saves.
    if 2 * len(ids) > base.size:
        return _finite(name, VocabularyRows(None, _owned(tensor, base_matrix.dtype)), findings)
    values = tensor.index_select(0, ids).to(base_matrix.dtype).contiguous()
    return _finite(name, VocabularyRows(ids, values), findings)


def changed_rows(tensor: torch.Tensor, base_matrix: torch.Tensor) -> torch.Tensor:
    """Ids of the rows that differ after a cast of both matrices to the coarser dtype."""
    served = base_matrix.cpu()
    found = []
    for start in range(0, len(tensor), _ROWS_PER_BLOCK):
        mine, theirs = (m[start : start + _ROWS_PER_BLOCK] for m in (tensor, served))
        is_other = (mine.to(theirs.dtype) != theirs) & (mine != theirs.to(mine.dtype))
        found.append(is_other.any(dim=1).nonzero().squeeze(1) + start)
    return torch.cat(found)


def _owned(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy, because a view would keep all other tensors of the file in memory."""
    return tensor.to(dtype, copy=True).contiguous()


def _finite(name: str, rows: VocabularyRows, findings: Findings) -> VocabularyRows | None:
    if bool(torch.isfinite(rows.values).all()):
        return rows
    findings.add(name, say("NOT_FINITE", dtype=rows.values.dtype))
    return None


# The keys for trained rows: the one that any method may have, and the one of the method that trains
# only rows.
_TOKENS, _METHOD_TOKENS = "trainable_token_indices", "token_indices"


def take_vocabulary(
    checkpoint: AdapterCheckpoint,
    part: VocabularyPart,
    base: BaseModel,
    findings: Findings,
    *,
    is_lora: bool,
) -> tuple[AdapterCheckpoint, BaseModel, VocabularyOperators | None]:
    """Reads the vocabulary's part. Raises nothing: problems are added to the findings.

    Args:
        checkpoint: The checkpoint.
        part: The vocabulary's part, with one row per token of the base.
        base: The base.
        findings: Receives the problems.
        is_lora: Whether the checkpoint's method may adapt the embedding.

    Returns:
        The checkpoint without that part; the base for the method; and the changes to the
        vocabulary, or None.
    """
    config, found, saved = checkpoint.config, part.found, part.saved
    rows = _trained_rows(config, part, base, findings)
    rows |= _whole_matrices(part, base, findings)
    # PEFT does not adapt modules that it saves whole.
    base = replace(
        base,
        modules={name: module for name, module in base.modules.items() if name not in saved},
        other_modules=base.other_modules - saved,
    )
    low_rank, changes = None, {}
    if is_lora:
        if EMBEDDING not in saved:
            low_rank, changes = _low_rank(config, found[EMBEDDING], base, findings)
        base = replace(base, other_modules=base.other_modules - {EMBEDDING})
    else:
        for name, _ in (found[EMBEDDING][role] for role in LOW_RANK if role in found[EMBEDDING]):
            findings.add(name, say("UNEXPECTED_TENSOR", by="peft_type"))
    is_partial = checkpoint.is_partial or part.is_cut
    is_partial |= any(role in found[EMBEDDING] for role in LOW_RANK)
    config = {**config, **changes}
    left = replace(checkpoint, config=config, tensors=part.rest, is_partial=is_partial)
    embedding, head = rows.get(EMBEDDING), rows.get(HEAD)
    if embedding is None and head is None and low_rank is None:
        return left, base, None
    return left, base, VocabularyOperators(embedding=embedding, low_rank=low_rank, head=head)


def _trained_ids(config: Mapping[str, Any], base: BaseModel) -> dict[str, list[int]] | None:
    """See ``VocabularyPart.ids``."""
    value = config.get(_TOKENS)
    if _METHOD_TOKENS in config:
        findings = Findings("")
        modules = trained_modules(config, base, findings)
        if findings.fields or fault_of_token_list(config[_METHOD_TOKENS]) is not None:
            return None
        value = dict.fromkeys(modules, config[_METHOD_TOKENS])
    if fault_of_token_indices(value) is not None:
        return None
    return token_ids_by_module(value, is_tied=base.vocabulary.is_tied)


def trained_modules(
    config: Mapping[str, Any], base: BaseModel, findings: Findings
) -> frozenset[str]:
    """The matrices that the method for trained rows adapts: by default, the embedding."""
    chosen = config.get("target_modules") or [EMBEDDING]
    if (why := fault_of_optional_selector(chosen)) is not None:
        findings.add("target_modules", why)
        return frozenset()
    selection = {"target_modules": chosen}
    linear = [name for name in base.modules if name != HEAD]
    others = [HEAD, EMBEDDING, *sorted(base.other_modules - {EMBEDDING})]
    targeted = resolve_targets(selection, linear, others, findings, base.text_prefix).targeted
    for name in sorted(targeted - {EMBEDDING, HEAD}):
        why = say("NOT_ADAPTABLE", module=name, method="trainable_tokens")
        findings.add("target_modules", why)
    if not targeted:
        findings.add("target_modules", say("SELECTS_NOTHING"))
    return targeted & {EMBEDDING, HEAD}


def _trained_rows(
    config: Mapping[str, Any], part: VocabularyPart, base: BaseModel, findings: Findings
) -> dict[str, VocabularyRows | None]:
    """The trained rows of the embedding and of the head."""
    rows: dict[str, VocabularyRows | None] = {}
    found, wanted = part.found, part.ids
    if wanted is None:
        return rows
    by, suffix = _TOKENS, "token_adapter"
    if _METHOD_TOKENS in config:
        by, suffix = _METHOD_TOKENS, "trainable_tokens_delta"
    is_shared = base.vocabulary.is_tied and HEAD in wanted and wanted[HEAD] == wanted.get(EMBEDDING)
    for module in (EMBEDDING, HEAD):
        name, tensor = found[module].get(ROWS, (f"{module}.{suffix}", None))
        ids = wanted.get(module)
        if module == HEAD and is_shared:
            rows[HEAD] = rows.get(EMBEDDING)
            ids = None
            # With save_embedding_layers, PEFT saves shared rows a second time.
            copied = found[EMBEDDING].get(ROWS, (name, None))[1]
            if tensor is not None and copied is not None and tensor.dtype == copied.dtype:
                tensor = None if torch.equal(tensor, copied) else tensor
        if tensor is not None and ids is not None:
            rows[module] = read_rows(name, tensor, ids, base.vocabulary, findings)
        elif tensor is not None:
            findings.add(name, say("UNEXPECTED_TENSOR", by=by))
        elif ids is not None:
            findings.add(name, say("MISSING_TENSOR", by=by))
    return rows


def _saved_modules(config: Mapping[str, Any], base: BaseModel) -> set[str]:
    """See ``VocabularyPart.saved``; the method's rules report a malformed value."""
    value = config.get("modules_to_save")
    if fault_of_modules_to_save(value) is not None:
        return set()
    saved = {module for name in value or () if (module := vocabulary_module(name)) is not None}
    is_tied = config.get("ensure_weight_tying") is True and base.vocabulary.is_tied
    return saved | {HEAD} if is_tied and EMBEDDING in saved else saved


def _whole_matrices(
    part: VocabularyPart, base: BaseModel, findings: Findings
) -> dict[str, VocabularyRows | None]:
    """The changed rows of modules that were saved whole.

    Reports matrices that PEFT added and that do not equal the base's.
    """
    matrices: dict[str, VocabularyRows | None] = {}
    found, saved, vocabulary = part.found, part.saved, base.vocabulary
    served = {EMBEDDING: vocabulary.embedding, HEAD: vocabulary.head}
    for module, matrix in served.items():
        name, tensor = found[module].get(WHOLE, (f"{module}.weight", None))
        if module in saved:
            if tensor is None:
                findings.add(name, say("MISSING_TENSOR", by="modules_to_save"))
                continue
            _check_alone(module, found[module], findings)
            same = found[EMBEDDING].get(WHOLE, (name, tensor))[1]
            is_tied = EMBEDDING in saved and vocabulary.head is vocabulary.embedding
            if module == HEAD and is_tied and torch.equal(same, tensor):
                matrices[HEAD] = matrices.get(EMBEDDING)  # use one copy for both
            else:
                matrices[module] = read_matrix(name, tensor, matrix, vocabulary, findings)
        elif tensor is not None:
            _check_unchanged(name, tensor, matrix, base, findings)
        if FROZEN in found[module]:
            _check_unchanged(*found[module][FROZEN], matrix, base, findings)
    return matrices


def _check_alone(module: str, found: FoundTensors, findings: Findings) -> None:
    for role in (ROWS, *LOW_RANK):
        if role in found:
            name = found[role][0]
            findings.add(name, say("UNEXPECTED_TENSOR", by="modules_to_save"))


def _check_unchanged(
    name: str, tensor: torch.Tensor, matrix: torch.Tensor, base: BaseModel, findings: Findings
) -> None:
    if tensor.ndim == 2 and not check_vocabulary(name, tensor.shape[0], base.vocabulary, findings):
        return
    if findings.check_shape(name, tensor, tuple(matrix.shape)) and len(
        changed_rows(tensor, matrix)
    ):
        findings.add(name, say("CHANGED_BASE_WEIGHT"))


def _low_rank(
    config: Mapping[str, Any], found: FoundTensors, base: BaseModel, findings: Findings
) -> tuple[EmbeddingLowRank | None, dict[str, Any]]:
    """LoRA on the embedding.

    Returns:
        The update, or None; and changes to the config, with which the method also reads factors of
        the head. With ``ensure_weight_tying`` PEFT saves them for a tied base, without naming the
        head in the config.
    """
    targets, changes = vocabulary_targets(config, base)
    name, a = found.get(A, (f"{EMBEDDING}.lora_embedding_A", None))
    if targets is None:
        return None, {}
    if EMBEDDING not in targets.targeted:
        for role in LOW_RANK:
            if role in found:
                findings.add(found[role][0], say("UNEXPECTED_TENSOR", by="target_modules"))
        return None, {}
    if ROWS in found:
        findings.add(found[ROWS][0], say("CONFLICTS_WITH", other="LoRA on the embedding"))
    b = found.get(B, (f"{EMBEDDING}.lora_embedding_B", None))
    for role_name, tensor in ((name, a), b):
        if tensor is None:
            findings.add(role_name, say("MISSING_TENSOR", by="target_modules"))
    if a is None or b[1] is None:
        return None, changes
    rank = targets.ranks[EMBEDDING]
    size, hidden = base.vocabulary.embedding.shape
    if a.ndim == 2 and not check_vocabulary(name, a.shape[1], base.vocabulary, findings):
        return None, changes
    is_fit = findings.check_shape(name, a, (rank, size), of_base=False)
    is_fit &= findings.check_shape(b[0], b[1], (hidden, rank), of_base=False)
    gain = None
    if (MAGNITUDE in found) != (config.get("use_dora") is True):
        by = "use_dora"
        is_there = MAGNITUDE in found
        why = say("UNEXPECTED_TENSOR", by=by) if is_there else say("MISSING_TENSOR", by=by)
        findings.add(f"{EMBEDDING}.lora_magnitude_vector", why)
        is_fit = False
    if not is_fit:
        return None, changes
    scaling = targets.scaling(EMBEDDING)
    wide = torch.promote_types(base.dtype, torch.float32)
    scaled = b[1].to(wide) * scaling
    if MAGNITUDE in found:
        magnitude_name, magnitude = found[MAGNITUDE]
        shapes = (hidden,), (1, hidden), (hidden, 1)
        if not findings.check_shape(magnitude_name, magnitude, *shapes):
            return None, changes
        # An embedding is transposed: its columns correspond to a linear module's rows.
        gain = dora_gain(magnitude, a, b[1], scaling, base.vocabulary.embedding.cpu().T)
        scaled = scaled * gain.to(wide)[:, None]
    result = EmbeddingLowRank(
        a.T.to(base.dtype).contiguous(), scaled.to(base.dtype).contiguous(), gain
    )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in result.tensors()):
        findings.add(name, say("NOT_FINITE", dtype=base.dtype))
        return None, changes
    return result, changes


def vocabulary_targets(
    config: Mapping[str, Any], base: BaseModel
) -> tuple[Targets | None, dict[str, Any]]:
    """The ranks and alphas that a LoRA's config sets for the embedding and the head.

    Returns:
        The targets, or None if a key for this is invalid; and changes to the config that target a
        tied head, if PEFT adapts it together with the embedding.
    """
    if not {"r", "lora_alpha", "target_modules"} <= config.keys():
        return None, {}
    selection = well_formed(config, *SIZES, *CHOICE)
    if selection is None:
        return None, {}
    # Faults found here are dropped, because the method's reader reports them.
    findings = Findings("")
    selection = {**selection, "use_rslora": config.get("use_rslora")}
    targets = resolve_targets(selection, [HEAD], [EMBEDDING], findings, base.text_prefix)
    if findings.fields:
        return None, {}
    is_tied = config.get("ensure_weight_tying") is True and base.vocabulary.is_tied
    if not is_tied or EMBEDDING not in targets.targeted or HEAD in targets.targeted:
        return targets, {}
    chosen = config["target_modules"]
    is_regex = isinstance(chosen, str)
    changes = {"target_modules": f"(?:{chosen}|{HEAD})" if is_regex else [*chosen, HEAD]}
    return vocabulary_targets({**config, **changes}, base)[0], changes


# Maximum number of rows after the base's, which take memory and an extra product in every step.
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
        The rows after the base's, or None; and the number of rows in training, or 0 if this number
        equals the base's or is invalid.
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
