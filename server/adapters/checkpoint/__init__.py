"""The content of an adapter's directory, checked but not yet interpreted. Needs no torch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from turret.lazy_torch import torch
from turret.server.adapters.adapter import TokenizerFiles
from turret.server.errors import AdapterCheckpointError, AdapterMismatchError, InvalidRequestError
from turret.server.words import Text, say

# Maximum number of findings in an error, because a hostile file can break thousands of rules.
MAX_REPORTED = 64
# Maximum number of kinds of findings that a message describes, and of further fields that it lists
# for each kind. The error's violations contain all reported findings.
_MOST_KINDS = 5
_MOST_ALIKE = 3

Finding = tuple[str, Text]


class HasShape(Protocol):
    """A tensor, or the entry of one in a file's header."""

    @property
    def shape(self) -> Sequence[int]: ...


class Findings:
    """The faults of a checkpoint and its mismatches with the base, in the order found.

    All of them are collected, so that one error reports them together.

    Args:
        path: The adapter's name in messages.
        base: The base's name, for messages; "" while nothing is compared with a base.
    """

    def __init__(self, path: str, base: str = "") -> None:
        self._path = path
        self._base = base
        # A message about mismatches begins with these: one cause often explains many wrong shapes.
        self.causes: tuple[Text, ...] = ()
        # Dictionaries serve as ordered sets, so a fault that two checks find is reported once.
        self._faults: dict[Finding, None] = {}
        self._mismatches: dict[Finding, None] = {}

    def add(self, field: str, why: Text) -> None:
        """Adds a fault of the checkpoint itself; ``field`` names a key, a file or a tensor."""
        self._faults.setdefault((field, why))

    def mismatch(self, field: str, why: Text) -> None:
        """Adds a field that may be valid in itself but does not fit this base."""
        self._mismatches.setdefault((field, why))

    @property
    def fields(self) -> frozenset[str]:
        """The fields with a fault."""
        return frozenset(field for field, _ in self._faults)

    @property
    def mismatched(self) -> frozenset[str]:
        """The fields that do not fit the base."""
        return frozenset(field for field, _ in self._mismatches)

    def check_shape(
        self, name: str, tensor: HasShape, *shapes: tuple[int, ...], of_base: bool = True
    ) -> bool:
        """Whether the tensor has one of the shapes.

        If not, adds a mismatch, or a fault if the base does not determine the shapes (``of_base``).
        """
        if tuple(tensor.shape) in shapes:
            return True
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        report = self.mismatch if of_base else self.add
        report(name, say("WRONG_SHAPE", shape=list(tensor.shape), expected=wanted))
        return False

    def raise_if_any(self, **more: str) -> None:
        """Raises an error for the findings, if any; faults of the checkpoint itself come first.

        Args:
            more: Further metadata of faults of the checkpoint.

        Raises:
            AdapterCheckpointError: The checkpoint is unsupported or inconsistent. ``violations``
                lists up to ``MAX_REPORTED`` faults and the number of further ones; the message
                describes only the first ones.
            AdapterMismatchError: The adapter is valid, but for another base. The mismatches are
                reported in the same way.
        """
        if self._faults:
            text = say(
                "ADAPTER_UNUSABLE",
                path=self._path,
                violation_count=len(self._faults),
                found=_summary(self._faults),
                **more,
            )
            raise AdapterCheckpointError(text, violations=_reported(self._faults))
        if self._mismatches:
            text = say(
                "ADAPTER_MISFIT",
                path=self._path,
                base_model=self._base,
                violation_count=len(self._mismatches),
                found=_summary(self._mismatches, self.causes),
            )
            raise AdapterMismatchError(text, violations=_reported(self._mismatches))


def refuse_all(found: Sequence[Finding]) -> None:
    """Raises one error for all faults of a request.

    Raises:
        InvalidRequestError: There is a fault.
    """
    if found:
        raise InvalidRequestError.of_all(found)


def _reported(found: dict[Finding, None]) -> list[Finding]:
    shown = list(islice(found, MAX_REPORTED))
    if len(found) > len(shown):
        shown.append(("", say("MORE", count=len(found) - len(shown))))
    return shown


def _summary(found: Iterable[Finding], causes: Iterable[Text] = ()) -> Text:
    """One sentence for each reason, about the first field with it."""
    alike: dict[str, list[Finding]] = {}
    for field, why in found:
        alike.setdefault(why.reason, []).append((field, why))
    kinds = list(alike.values())
    lines = list(causes)
    for (field, why), *others in kinds[:_MOST_KINDS]:
        if others:
            names = [name for name, _ in others]
            fields = ", ".join(names[:_MOST_ALIKE] + ["…"] * (len(names) > _MOST_ALIKE))
            count = len(others)
            lines.append(say("FINDING_AND_MORE", field=field, why=why, count=count, fields=fields))
        else:
            lines.append(say("FINDING", field=field, why=why))
    if hidden := sum(map(len, kinds[_MOST_KINDS:])):
        lines.append(say("MORE", count=hidden))
    return say("FINDINGS", found="; ".join(lines), first=lines[0])


# Name of the tensor that holds the prompt in methods that learn one.
PROMPT_EMBEDDINGS = "prompt_embeddings"
PEFT_PREFIX = "base_model.model."
# torch.compile, FSDP and activation checkpointing insert these components around an unchanged
# module. They do not change which parameter a name means, so they are dropped.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# A raw state dict has the adapter's name after the parameter's (lora_A.default.weight).
DEFAULT_NAME = "default"
# Prefixes of the language model in models of text and images: the current one, and the one of
# transformers before 4.52. A plain language model has "model." instead.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.")
_TEXT_HEAD = "language_model.lm_head."
# Stands for no prefix at all: a model without its head (AutoModel, as for embeddings).
NO_PREFIX = "(none)"
_OWN_PARTS = ("layers.", "embed_tokens.", "norm.")


def canonical_name(name: str) -> str:
    """A name without ``base_model.model.``, wrapper components and the ``default`` adapter name.

    ``base_model.model.model.layers.0.q_proj.lora_A.default.weight`` becomes
    ``model.layers.0.q_proj.lora_A.weight``. The prefixes of the language model in models of text
    and images become ``model.`` as well.
    """
    return _own_name(_without_noise(name))


def text_prefix(names: Iterable[str]) -> str:
    """The prefix of the names: one of ``TEXT_PREFIXES``, ``NO_PREFIX``, or "" for the usual one."""
    for name in names:
        if _without_noise(name).startswith("layers."):
            return NO_PREFIX
        if "language_model." in name:
            bare = _without_noise(name)
            for prefix in TEXT_PREFIXES:
                if bare.startswith(prefix):
                    return prefix
    return ""


def name_in_training(module: str, prefix: str) -> str:
    """A module's name in the model that the adapter was trained on, by its ``text_prefix``."""
    if not prefix:
        return module
    if prefix == NO_PREFIX:
        return module.removeprefix("model.")
    if module.startswith("model."):
        return prefix + module.removeprefix("model.")
    return f"language_model.{module}" if prefix == TEXT_PREFIXES[1] else module


def _own_name(name: str) -> str:
    for prefix in TEXT_PREFIXES:
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    if name.startswith(_OWN_PARTS):
        return f"model.{name}"
    return name.removeprefix("language_model.") if name.startswith(_TEXT_HEAD) else name


def _without_noise(name: str) -> str:
    if DEFAULT_NAME not in name and not any(wrapper in name for wrapper in WRAPPERS):
        return name.removeprefix(PEFT_PREFIX)
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    joined = ".".join(parts).removeprefix(PEFT_PREFIX)
    parts = joined.split(".")
    kept = [
        part
        for i, part in enumerate(parts)
        if not (part == DEFAULT_NAME and i > 0 and parts[i - 1].startswith("lora_"))
    ]
    return ".".join(kept)


def canonical_names(names: Sequence[str], findings: Findings) -> dict[str, str]:
    """Maps each name to its canonical form; two names with the same form are a fault."""
    result: dict[str, str] = {}
    first: dict[str, str] = {}
    for name in names:
        canonical = canonical_name(name)
        if canonical in first:
            findings.add(name, say("DUPLICATE_TENSOR", other=first[canonical]))
            continue
        first[canonical] = name
        result[name] = canonical
    return result


_TASK_DOMAIN = b"turret-adapter-task-1\0"
_TOKENIZER_DOMAIN = b"turret-adapter-tokenizer-1\0"


@dataclass(frozen=True, slots=True)
class TrainedBase:
    """The base of an adapter's training, as ``turret train`` recorded it.

    Attributes:
        digest: The digest of its weights; "" if none is readable.
        weights: How its modules were stored, see ``BaseModel.weights``; empty if none is readable.
    """

    digest: str = ""
    weights: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class AdapterCheckpoint:
    """The content of a directory: structurally valid and finite, but not yet interpreted.

    Attributes:
        path: The adapter's name in messages: its path below the adapter root, or the name of an
            uploaded adapter.
        config: ``adapter_config.json``.
        tensors: By canonical name (module path and PEFT's parameter name, without wrapper
            prefixes), in the file's dtype; views of one buffer, which is not the file's mapping.
        digest: SHA-256, hex, over the config (canonical JSON) and every byte of the tensor file.
        bytes_disk: Size of the two files, and of its own tokenizer's.
        is_partial: Whether tensors were left out on purpose, so that the method must not report
            them as missing.
        trained_base: The base in ``provenance.json`` alongside the files.
        task: The task, if the files contain several; otherwise None. The digest includes it.
        text_prefix: The prefix of the language model's names in training; see the function
            ``text_prefix``.
        tokenizer: The adapter's own tokenizer, or None. The digest includes it.
        chat_template: See ``AdapterFacts``. The digest does not include it.
    """

    path: str
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    digest: str
    bytes_disk: int
    is_partial: bool = False
    trained_base: TrainedBase = TrainedBase()
    task: int | None = None
    text_prefix: str = ""
    tokenizer: TokenizerFiles | None = None
    chat_template: str = ""

    @property
    def content(self) -> tuple[str, str]:
        """See ``AdapterFacts.content``."""
        return self.digest, self.chat_template

    def of_task(self, task: int | None) -> AdapterCheckpoint:
        """A copy for one task in the files, which counts as another adapter with its own digest."""
        if task is None:
            return self
        return replace(self, task=task, digest=digest_of_task(self.digest, task))

    def with_tokenizer(self, tokenizer: TokenizerFiles) -> AdapterCheckpoint:
        """A copy with its own tokenizer, which counts as another adapter with its own digest."""
        return replace(
            self,
            tokenizer=tokenizer,
            digest=digest_with_tokenizer(self.digest, tokenizer.digest),
            bytes_disk=self.bytes_disk + tokenizer.bytes_disk,
        )


def digest_of_task(digest: str, task: int | None) -> str:
    """The digest of one task, from the digest of all of an adapter's files."""
    if task is None:
        return digest
    return hashlib.sha256(_TASK_DOMAIN + bytes.fromhex(digest) + str(task).encode()).hexdigest()


def digest_with_tokenizer(digest: str, tokenizer: str) -> str:
    """The digest of an adapter with its own tokenizer, from those of weights and tokenizer."""
    both = bytes.fromhex(digest) + bytes.fromhex(tokenizer)
    return hashlib.sha256(_TOKENIZER_DOMAIN + both).hexdigest()
