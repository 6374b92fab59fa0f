"""The adapter methods, one file each.

Every file in this folder that is not in ``_OWN`` is a method; there is no other list of methods.

Nothing here loads torch, so that a starting server can check adapters before it loads the model.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from turret.server.adapters.checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.lowering import LinearMethod, Method
from turret.server.adapters.methods.prompt_kit import SoftTokens
from turret.server.basics.names import closest
from turret.server.words import Text, say

_FLOATS = "floating-point numbers"
AnyMethod = LinearMethod | Method | SoftTokens

CONVERT = (
    "convert it to an exact LoRA with `turret convert DIR --base MODEL --output NEW`, where MODEL"
    " is the model it was trained on"
)
# ``peft_type`` that turret does not serve → advice; tests compare the keys with the installed PEFT.
UNSERVED: Mapping[str, str] = {
    "ADAMSS": f"its file lacks the clusters of rows that it adapts; {CONVERT}",
    "PSOFT": f"its file lacks the factors that it rotates; {CONVERT}",
    "LILY": (
        "its routers average over all tokens of a call, so that no token has a result of its own;"
        " train one of the served methods"
    ),
    "SHADOW": "it is a second model in addition to the base; train one of the served methods",
}


# Modules that are not methods, some of which import this file.
_OWN = ("check", "kit", "lower", "prompt_kit", "wavelets")


def _discover() -> dict[str, AnyMethod]:
    methods: dict[str, AnyMethod] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name not in _OWN:
            method: AnyMethod = importlib.import_module(f"{__name__}.{info.name}").METHOD
            assert method.name not in methods, f"two methods are called {method.name!r}"
            methods[method.name] = method
    return dict(sorted(methods.items()))


METHODS: Mapping[str, AnyMethod] = _discover()


def method_for(checkpoint: AdapterCheckpoint) -> AnyMethod:
    """The method of a checkpoint.

    Raises:
        AdapterCheckpointError: ``peft_type`` is missing, or no method in ``METHODS`` accepts it.
            The error's metadata lists all methods.
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
    """Rejects integer tensors that the method does not declare, and a task if it has no tasks.

    Raises:
        AdapterCheckpointError: There are such tensors, or such a task. The error lists them.
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
