"""The adapter methods, one file each.

Every file in these packages that assigns ``METHOD`` is a method; no other list names it.

Nothing here loads torch, so that a starting server can check adapters before it loads the model.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.lowering.method import LinearMethod, Method
from turret.server.adapters.methods.prompt_kit import SoftTokens
from turret.server.adapters.methods.unserved import UNSERVED
from turret.server.basics.names import closest
from turret.server.words import Text, say

_FLOATS = "floating-point numbers"
AnyMethod = LinearMethod | Method | SoftTokens


def _discover() -> dict[str, AnyMethod]:
    methods: dict[str, AnyMethod] = {}
    for name in _files(__name__, __path__):
        method: AnyMethod | None = getattr(importlib.import_module(name), "METHOD", None)
        if method is not None:
            assert method.name not in methods, f"two methods are called {method.name!r}"
            methods[method.name] = method
    return dict(sorted(methods.items()))


def _files(package: str, path: Iterable[str]) -> Iterator[str]:
    """Full names of the modules in a package's own packages, and in folders added to it."""
    for info in pkgutil.iter_modules(path):
        name = f"{package}.{info.name}"
        if info.ispkg:
            yield from _files(name, importlib.import_module(name).__path__)
        elif name not in _OWN:
            yield name


_OWN = {f"{__name__}.{name}" for name in ("check", "kit", "lower", "prompt_kit", "unserved")}
METHODS: Mapping[str, AnyMethod] = _discover()


def method_for(checkpoint: AdapterCheckpoint) -> AnyMethod:
    """The method of a checkpoint.

    Raises:
        AdapterCheckpointError: ``peft_type`` is missing, or no method in ``METHODS`` accepts it.
            The metadata lists all methods.
    """
    kind = _peft_type_of(checkpoint.config)
    for method in METHODS.values():
        if kind in method.peft_types and method.accepts(checkpoint.config):
            return method
    findings = Findings(checkpoint.path)
    findings.add("peft_type", _why_unserved(kind))
    findings.raise_if_any(peft_type=kind[:60], supported=",".join(METHODS))
    raise AssertionError("it was a fault")


def check_common(checkpoint: AdapterCheckpoint, method: AnyMethod) -> None:
    """Rejects integer tensors or a task that the method does not have.

    Raises:
        AdapterCheckpointError: There are such tensors or tasks. The error names them.
    """
    findings, integers = Findings(checkpoint.path), method.integers
    for name, tensor in checkpoint.tensors.items():
        if not tensor.is_floating_point() and not any(
            f".{part}." in f".{name}." for part in integers
        ):
            findings.add(name, say("WRONG_DTYPE", dtype=tensor.dtype, expected=_FLOATS))
    if checkpoint.task is not None and method.tasks is None:
        findings.add("task", say("NO_TASKS", method=method.name))
    findings.raise_if_any()


def _peft_type_of(config: Mapping[str, Any]) -> str:
    """A config's ``peft_type`` in upper case; "" if it is missing or not a string."""
    value = config.get("peft_type")
    return value.upper() if isinstance(value, str) else ""


def _why_unserved(kind: str) -> Text:
    if not kind:
        return say("REQUIRED")
    if kind in UNSERVED:
        return say("UNSUPPORTED_VALUE", value=kind, why=UNSERVED[kind])
    served = {one for method in METHODS.values() for one in method.peft_types}
    return say("UNKNOWN_METHOD", value=kind, closest=closest(kind, sorted({*served, *UNSERVED})))
