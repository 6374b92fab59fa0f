"""The adapter methods, one file each: a new file here that binds ``METHOD`` is served."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from turret.server.adapters.checkpoint import AdapterCheckpoint
from turret.server.adapters.lowered import Method
from turret.server.adapters.unserved_methods import UNSERVED
from turret.server.errors import AdapterCheckpointError


def _discover() -> dict[str, Method]:
    methods: dict[str, Method] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        method: Method = importlib.import_module(f"{__name__}.{info.name}").METHOD
        assert method.name not in methods, f"two methods are called {method.name!r}"
        methods[method.name] = method
    return methods


METHODS: Mapping[str, Method] = _discover()


def method_for(checkpoint: AdapterCheckpoint) -> Method:
    """The method a checkpoint was made by.

    Raises:
        AdapterCheckpointError: ``peft_type`` is missing or none of ``METHODS`` accepts it; the
            message lists the supported ones.
    """
    supported = sorted({kind for method in METHODS.values() for kind in method.peft_types})
    kind = _peft_type(checkpoint.config)
    for method in METHODS.values():
        if kind in method.peft_types and method.accepts(checkpoint.config):
            return method
    served = f"supported peft_type values: {', '.join(supported)} (methods: {', '.join(METHODS)})"
    if not kind:
        why = f"is required; {served}"
    elif kind in UNSERVED:
        why = f"method {kind!r} is not supported by this version: {UNSERVED[kind]}; {served}"
    else:
        why = f"method {kind!r:.60} is not supported by this version; {served}"
    raise AdapterCheckpointError(
        f"adapter {checkpoint.path!r} cannot be served: peft_type {why}",
        metadata={"path": checkpoint.path, "peft_type": kind[:60], "supported": ",".join(METHODS)},
        violations=[("peft_type", why)],
    )


def _peft_type(config: Mapping[str, Any]) -> str:
    value = config.get("peft_type")
    return value.upper() if isinstance(value, str) else ""
