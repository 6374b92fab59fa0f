"""Whether two names mean the same base model, as far as names can tell."""

from __future__ import annotations

import re

from turret.server.errors import AdapterMismatchError

# Repackagings of the same weights, as publishers append them to the model's name.
_REPACKAGED = re.compile(
    r"[-_.](unsloth|bnb|4bit|8bit|nf4|int4|int8|fp4|fp8|bf16|fp16|f16|f32|hf|gguf|awq|gptq|dynamic"
    r"|quantized)$"
)
_EXTENSION = re.compile(r"\.(gguf|safetensors)$")
_GGUF_TYPE = re.compile(r"[-_.](ud-)?(i?q[1-8]_([0-9k]|xxs|xs|s|m|nl)(_(s|m|l|xl))?|f16|f32|bf16)$")
# ~/.cache/huggingface/hub/models--ORG--NAME/snapshots/COMMIT
_HUB_CACHE = re.compile(r"(?:^|/)models--[^/]*?--([^/]+)(?:/|$)")
# A name that says how large the model is names a model; "model" or "checkpoint" name a folder.
_SIZE = re.compile(r"(?:^|[-_.x])\d+(?:\.\d+)?[bm](?:$|[-_.])")
_LOCAL = re.compile(r"^(?:[/~.]|[a-z]:/)|/.*/", re.IGNORECASE)


def normalise_base_name(name: str) -> str:
    """``unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit`` → ``llama-3.1-8b-instruct``.

    The publisher, a leading ``meta-`` and suffixes that name only a storage format are dropped; of
    a place in the hub's cache the model's name stays.
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


def base_name_warning(adapter_base: str, served_base: str) -> str | None:
    """A warning when the names differ."""
    if not adapter_base or not served_base:
        return None
    if normalise_base_name(adapter_base) == normalise_base_name(served_base):
        return None
    return (
        f"trained for base model {adapter_base!r:.200}, served on {served_base!r:.200}:"
        " shapes fit, the weights may not"
    )


def is_other_base(adapter_base: str, served_base: str) -> bool:
    """Whether the names prove that these are two models.

    They do where both say how large the model is and yet differ. A path on the machine that trained
    proves nothing, unless it is one of the hub's cache.
    """
    text = adapter_base.replace("\\", "/")
    if _LOCAL.search(text) and not _HUB_CACHE.search(text):
        return False
    names = normalise_base_name(adapter_base), normalise_base_name(served_base)
    return names[0] != names[1] and all(_SIZE.search(name) for name in names)


def of_other_base(path: str, trained: str, served: str) -> AdapterMismatchError:
    """The refusal of an adapter that says that its base is another one.

    Args:
        path: The adapter, as messages name it.
        trained: The base that it names.
        served: The base's name.
    """
    return AdapterMismatchError(
        f"adapter {path!r} was trained for {trained!r:.200}, served is {served!r:.200}: even where"
        " the shapes fit, its answers are wrong on other weights; serve the base that it was"
        " trained for, or, if both are the same weights, let turret serve --allow-other-base take"
        " it",
        metadata={"path": path, "base_model": served, "trained_for": trained[:200]},
        violations=[("base_model_name_or_path", f"is {trained!r:.200}")],
    )
