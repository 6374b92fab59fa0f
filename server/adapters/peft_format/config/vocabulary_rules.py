"""The config keys about embedding and head, as all methods share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turret.server.adapters.operators.module_names import EMBEDDING, HEAD

_NAMES = {name: module for module in (EMBEDDING, HEAD) for name in (module, module.split(".")[-1])}
_MAX_IDS = 1 << 20


def vocabulary_module(name: str) -> str | None:
    """``model.embed_tokens`` or ``lm_head`` for a name by which PEFT finds it, else None."""
    return _NAMES.get(name)


def is_modules_to_save(value: Any) -> str | None:
    """``modules_to_save``: embedding and head are served, other modules are not."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return "must be a list of module names or null"
    others = [name for name in value if vocabulary_module(name) is None]
    if not others:
        return None
    return (
        f"names {', '.join(map(repr, others)):.120}: whole modules are served for embed_tokens and"
        " lm_head only; another whole matrix costs as much as the base's own; express the change"
        " as LoRA"
    )


def is_head_to_save(value: Any) -> str | None:
    """``modules_to_save`` of methods whose prompt PEFT embeds by the base's own matrix."""
    problem = is_modules_to_save(value)
    if problem is None and EMBEDDING in map(vocabulary_module, value or ()):
        return (
            "names the embedding, which PEFT saves but does not use beside soft tokens; train it"
            " with another method"
        )
    return problem


def is_token_indices(value: Any) -> str | None:
    """``trainable_token_indices``: a list of ids for the embedding, or lists by module."""
    if value is None or isinstance(value, list):
        return None if value is None else is_token_list(value)
    if not isinstance(value, Mapping):
        return "must be a list of token ids, an object of such lists by module, or null"
    for name, ids in value.items():
        if vocabulary_module(name) is None:
            return f"names {name!r:.60}; only embed_tokens and lm_head have a row per token"
        problem = is_token_list(ids)
        if problem is not None:
            return f"{name!r} {problem}"
    return None


def is_token_list(value: Any) -> str | None:
    ok = isinstance(value, list) and 0 < len(value) <= _MAX_IDS
    if not ok or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        return "must be a non-empty list of token ids"
    return None if len(set(value)) == len(value) else "holds a token id twice"


def token_ids_by_module(value: Any, *, is_tied: bool) -> dict[str, list[int]]:
    """The rows that ``trainable_token_indices`` (well-formed) selects, by module.

    With tied embeddings the rows of the embedding are rows of the head too, unless the head has
    other ones of its own (PEFT's ``set_additional_trainable_modules``).
    """
    if value is None:
        return {}
    by_name = value if isinstance(value, Mapping) else {EMBEDDING: value}
    found = {_NAMES[name]: list(ids) for name, ids in by_name.items()}
    if is_tied and EMBEDDING in found:
        found.setdefault(HEAD, found[EMBEDDING])
    return found
