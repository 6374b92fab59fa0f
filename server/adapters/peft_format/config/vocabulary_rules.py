"""The config keys about embedding and head, as all methods share them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from turret.server.adapters.operators.module_names import EMBEDDING, HEAD
from turret.server.adapters.peft_format.config.rules import invalid
from turret.server.words import Text, say

_NAMES = {name: module for module in (EMBEDDING, HEAD) for name in (module, module.split(".")[-1])}
_MAX_IDS = 1 << 20


def vocabulary_module(name: str) -> str | None:
    """``model.embed_tokens`` or ``lm_head`` for a name by which PEFT finds it, else None."""
    return _NAMES.get(name)


def is_modules_to_save(value: Any) -> Text | None:
    """``modules_to_save``: embedding and head are served, other modules are not."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return invalid(value, "a list of module names or null")
    others = [name for name in value if vocabulary_module(name) is None]
    if not others:
        return None
    why = "only embed_tokens and lm_head are served as whole modules; express the change as LoRA"
    return say("UNSUPPORTED_VALUE", value=others, why=why)


def is_head_to_save(value: Any) -> Text | None:
    """``modules_to_save`` of methods whose prompt PEFT embeds by the base's own matrix."""
    problem = is_modules_to_save(value)
    if problem is None and EMBEDDING in map(vocabulary_module, value or ()):
        why = "PEFT does not use a saved embedding beside soft tokens; train it with another method"
        return say("UNSUPPORTED_VALUE", value=value, why=why)
    return problem


def is_token_indices(value: Any) -> Text | None:
    """``trainable_token_indices``: a list of ids for the embedding, or lists by module."""
    if value is None or isinstance(value, list):
        return None if value is None else is_token_list(value)
    if not isinstance(value, Mapping):
        return invalid(value, "a list of token ids, an object of such lists by module, or null")
    for name, ids in value.items():
        if vocabulary_module(name) is None:
            return say("NOT_ADAPTABLE", module=name, method="trainable_tokens")
        problem = is_token_list(ids)
        if problem is not None:
            return say("INVALID_ENTRY", entry=name, why=problem)
    return None


def is_token_list(value: Any) -> Text | None:
    ok = isinstance(value, list) and 0 < len(value) <= _MAX_IDS
    if not ok or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        return invalid(value, "a non-empty list of token ids")
    return listed_twice(value)


def listed_twice(values: Sequence[Any]) -> Text | None:
    """The fault of a list that names a value more than once."""
    twice = next((value for value, count in Counter(values).items() if count > 1), None)
    return None if twice is None else say("DUPLICATE", value=twice)


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
