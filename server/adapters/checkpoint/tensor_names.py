"""Names of tensors in a PEFT file, without the noise that wrappers leave in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from turret.server.adapters.checkpoint.findings import Findings
from turret.server.words import say

# Name of the tensor in methods that learn a prompt.
PROMPT_EMBEDDINGS = "prompt_embeddings"
PEFT_PREFIX = "base_model.model."
# Inserted by torch.compile, FSDP and activation checkpointing around an unchanged module: the
# parameter is the same one, so dropping the component cannot change what it means.
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
    """Drops ``base_model.model.``, wrapper components and the ``default`` adapter name.

    ``base_model.model.model.layers.0.q_proj.lora_A.default.weight`` becomes
    ``model.layers.0.q_proj.lora_A.weight``, and so it does with ``language_model`` in it.
    """
    return _own_name(_without_noise(name))


def text_prefix(names: Iterable[str]) -> str:
    """The ``TEXT_PREFIXES`` entry, or ``NO_PREFIX``, that names have; "" for the usual names."""
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
    """Maps each name to its canonical form; two that meet are a fault that names both."""
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
