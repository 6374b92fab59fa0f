"""The vocabulary changes of the packed adapters, on the device."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from turret.server.adapters.operators import AdapterOperators
from turret.server.adapters.vocabulary_step import VocabularyChange


class TokenBank:
    """By adapter key. On the CPU the tensors are those of the host, not copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._changes: dict[str, VocabularyChange] = {}

    def insert(self, key: str, operators: AdapterOperators) -> None:
        """Keep what an adapter does to the vocabulary, if it does anything."""
        if operators.changes_vocabulary:
            change = VocabularyChange(head=operators.head, tokens=operators.tokens)
            self._changes[key] = _moved(change, self._device, {})

    def remove(self, key: str) -> None:
        """Forget an adapter; unknown ones are ignored."""
        self._changes.pop(key, None)

    def get(self, key: str) -> VocabularyChange | None:
        return self._changes.get(key)


def _moved(value: Any, device: torch.device, done: dict[int, Any]) -> Any:
    """Every tensor inside on the device; what is there twice (tied rows) is moved once."""
    if id(value) in done:
        return done[id(value)]
    result = value
    if isinstance(value, torch.Tensor):
        result = value.to(device)
    elif isinstance(value, tuple):
        result = tuple(_moved(item, device, done) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _moved(getattr(value, f.name), device, done) for f in fields(value)}
        result = replace(value, **parts)
    done[id(value)] = result
    return result
