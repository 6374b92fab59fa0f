"""The methods that a server can train. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from turret.server.adapters.lowering import LinearMethod
from turret.server.adapters.methods import METHODS as SERVED
from turret.server.adapters.methods.prompt_kit import SoftTokens

# Methods by name, with config keys that differ from those of the method that reads the files.
_VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "rslora": ("lora", {"use_rslora": True}),
}


def _trained() -> Iterator[str]:
    for name, method in SERVED.items():
        # A variant of LoRA inherits its start, which makes no adapter of that variant.
        start = method.start if isinstance(method, LinearMethod | SoftTokens) else None
        if start is not None and method.accepts(start.config(1, ())):
            yield name


METHODS = tuple(sorted((*_trained(), *_VARIANTS)))


def served_method(name: str) -> tuple[LinearMethod | SoftTokens, Mapping[str, Any]]:
    """The method that serves what one of ``METHODS`` trains, and the keys that its config adds."""
    served, changes = _VARIANTS.get(name, (name, {}))
    method = SERVED[served]
    assert isinstance(method, LinearMethod | SoftTokens)
    return method, changes
