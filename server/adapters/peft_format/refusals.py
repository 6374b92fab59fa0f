"""Reasons not to serve an adapter on this base, on this server, or as this task. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from turret.server.adapters.base import BaseModel, BaseSizes
from turret.server.adapters.checkpoint import AdapterCheckpoint, Findings
from turret.server.errors import AdapterMismatchError, BudgetExceededError
from turret.server.words import Text, say

# Suffixes that publishers add to a model's name for repackaged versions of the same weights.
_REPACKAGED = re.compile(
    r"[-_.](unsloth|bnb|4bit|8bit|nf4|int4|int8|fp4|fp8|bf16|fp16|f16|f32|hf|gguf|awq|gptq|dynamic"
    r"|quantized)$"
)
# Suffixes of models whose weights are not NF4 in all modules.
_OTHER_FORMAT = re.compile(
    r"[-_.](unsloth[-_.]bnb[-_.]4bit|8bit|int4|int8|fp4|fp8|awq|gptq|dynamic)(?=$|[-_.])"
)
_EXTENSION = re.compile(r"\.(gguf|safetensors)$")
_GGUF_TYPE = re.compile(r"[-_.](ud-)?(i?q[1-8]_([0-9k]|xxs|xs|s|m|nl)(_(s|m|l|xl))?|f16|f32|bf16)$")
# Matches ~/.cache/huggingface/hub/models--ORG--NAME/snapshots/COMMIT.
_HUB_CACHE = re.compile(r"(?:^|/)models--[^/]*?--([^/]+)(?:/|$)")
# A name with a size belongs to a model. Names such as "model" or "checkpoint" are just directories.
_SIZE = re.compile(r"(?:^|[-_.x])\d+(?:\.\d+)?[bm](?:$|[-_.])")
_LOCAL = re.compile(r"^(?:[/~.]|[a-z]:/)|/.*/", re.IGNORECASE)
# LyCORIS joins a module's path into one word after a prefix, and stores alpha as a tensor.
_LYCORIS_PREFIXES = ("lycoris_", "lora_unet_", "lora_te_")
_LYCORIS_SUFFIXES = (".alpha", ".dora_scale", ".scalar", ".on_input")


def normalise_base_name(name: str) -> str:
    """``unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit`` → ``llama-3.1-8b-instruct``.

    The publisher, a leading ``meta-``, and suffixes that only name a storage format are dropped.
    For a path in the hub's cache, the name of the model is used.
    """
    text = name.rstrip("/").replace("\\", "/")
    cached = _HUB_CACHE.search(text)
    text = (cached[1] if cached else text.rsplit("/", 1)[-1]).lower()
    text = _EXTENSION.sub("", text)
    while True:
        shorter = _GGUF_TYPE.sub("", _REPACKAGED.sub("", text))
        if shorter == text or not shorter:
            break
        text = shorter
    return text.removeprefix("meta-").replace("_", "-")


def base_name_warning(adapter_base: str, served_base: str) -> Text | None:
    """A warning if the names differ, except in publisher or storage format; else None."""
    if not adapter_base or not served_base:
        return None
    if normalise_base_name(adapter_base) == normalise_base_name(served_base):
        return None
    return say("TRAINED_FOR_ANOTHER_BASE", trained=adapter_base, served=served_base)


def base_difference(checkpoint: AdapterCheckpoint, base: BaseModel) -> Text | None:
    """The difference between the weights an adapter was trained on and those served, if known.

    The digest in ``provenance.json`` decides, if there is one; otherwise the name of the base does.
    """
    trained = checkpoint.trained_base
    if trained.digest:
        # Compare the formats too, because training with ``full`` weights records the digest of the
        # quantised weights.
        differ = sorted(k for k in base.weights if trained.weights.get(k) != base.weights[k])
        if trained.weights and differ:
            shown = ", ".join(base.weights_shown.get(kind, kind) for kind in differ)
            return say("STORED_OTHERWISE", modules=shown)
        if trained.digest == base.digest:
            return None
        return say("OTHER_WEIGHTS", trained=trained.digest[:12], served=base.digest[:12])
    name = checkpoint.config.get("base_model_name_or_path") or ""
    if found := base_name_warning(name, base.name):
        return found
    format_of = {n: _OTHER_FORMAT.search(n.lower()) for n in (name, base.name)}
    if (other := format_of[name]) and not format_of[base.name]:
        return say("OTHER_QUANTIZATION", trained=name, served=base.name, value=other[0][1:])
    return None


def is_other_base(adapter_base: str, served_base: str) -> bool:
    """Whether the names prove that these are different models.

    Two names that both contain a size and differ prove it. A local path from the training machine
    proves nothing, unless the path is in the hub's cache.
    """
    text = adapter_base.replace("\\", "/")
    if _LOCAL.search(text) and not _HUB_CACHE.search(text):
        return False
    names = normalise_base_name(adapter_base), normalise_base_name(served_base)
    return names[0] != names[1] and all(_SIZE.search(name) for name in names)


def of_other_base(path: str, trained: str, served: str) -> AdapterMismatchError:
    """The error for an adapter whose config names another base.

    Args:
        path: The adapter's name in messages.
        trained: The base that the config names.
        served: The base's name.
    """
    text = say("OTHER_BASE", path=path, base_model=served, trained_for=trained)
    return AdapterMismatchError(text, violations=[("base_model_name_or_path", text)])


_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_A = (".lora_A.weight", ".hada_w1_b", ".lora_A")
# Modules of multimodal models that are outside the language model and not served.
_VISION = ("vision_tower.", "visual.", "multi_modal_projector.", "vision_model.")


def causes_of_mismatch(
    config: Mapping[str, Any], tensors: Mapping[str, Any], base: BaseModel | BaseSizes
) -> tuple[Text, ...]:
    """The likeliest cause, and the base on which the adapter was trained, if they are known.

    Args:
        config: ``adapter_config.json``.
        tensors: By canonical name; each has a shape.
        base: The base model as served, or the known facts about it.
    """
    causes = (_vision(tensors), too_many_layers(tensors, base.num_layers), _width(tensors, base))
    cause = next((text for text in causes if text), None)
    trained = config.get("base_model_name_or_path")
    # Leave out equal names, because they would contradict the cause.
    is_other = trained and trained != base.name
    names = say("TRAINED_FOR", trained=trained, served=base.name) if is_other else None
    return tuple(text for text in (cause, names) if text)


def _vision(names: Iterable[str]) -> Text | None:
    for name in names:
        own = name.removeprefix("model.")
        if own.startswith(_VISION):
            return say("ADAPTS_VISION", part=own.partition(".")[0])
    return None


def too_many_layers(names: Iterable[str], num_layers: int) -> Text | None:
    """The message about tensors of layers that the base lacks; None if it has all of them."""
    found = [int(match[1]) for name in names if (match := _LAYER.search(name))]
    count = max(found, default=-1) + 1
    if count <= num_layers:
        return None
    return say("TOO_MANY_LAYERS", found=count, expected=num_layers)


def _width(tensors: Mapping[str, Any], base: BaseModel | BaseSizes) -> Text | None:
    for name, tensor in tensors.items():
        for suffix in _A:
            module = base.modules.get(name.removesuffix(suffix))
            if not name.endswith(suffix) or module is None or len(tensor.shape) != 2:
                continue
            if tensor.shape[1] != module.in_features:
                return say(
                    "WRONG_INPUTS",
                    module=module.name.rpartition(".")[2],
                    found=tensor.shape[1],
                    expected=module.in_features,
                )
    return None


def check_rank(path: str, rank: int, max_rank: int | None, *, name: str = "rank") -> None:
    """Rejects a rank over the server's limit; ``name`` is the rank's name in the message.

    Raises:
        BudgetExceededError: The adapter exceeds the limit.
    """
    if max_rank is not None and rank > max_rank:
        text = say("RANK_OVER_LIMIT", path=path, name=name, rank=rank, max_rank=max_rank)
        raise BudgetExceededError(text)


def check_task(checkpoint: AdapterCheckpoint, count_key: str, findings: Findings) -> int:
    """The chosen task: the requested one, or the only one.

    Args:
        checkpoint: The checkpoint as read.
        count_key: The config key of the number of tasks. The rules report an invalid value.
        findings: Receives the faults of the task; the result is then 0.
    """
    count = checkpoint.config.get(count_key)
    if not isinstance(count, int) or count_key in findings.fields:
        return 0
    if checkpoint.task is None and count > 1:
        findings.add("task", say("MISSING_TASK", most=count - 1))
    elif checkpoint.task is not None and checkpoint.task >= count:
        findings.add("task", say("NOT_IN_RANGE", least=0, most=count - 1, value=checkpoint.task))
    else:
        return checkpoint.task or 0
    return 0


def is_lycoris(name: str) -> bool:
    """Whether a tensor's name is a whole path in the form that LyCORIS writes."""
    return name.startswith(_LYCORIS_PREFIXES)


def why_unknown(name: str) -> Text:
    """The reason for rejecting a tensor that a method does not use."""
    if is_lycoris(name) or name.endswith(_LYCORIS_SUFFIXES):
        return say("LYCORIS_LAYOUT")
    is_whole = name.endswith(".weight") and ".lora_" not in name
    return say("WHOLE_WEIGHT") if is_whole else say("UNKNOWN_TENSOR")
