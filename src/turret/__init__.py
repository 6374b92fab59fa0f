"""turret: many adapters of many methods on one 4-bit base model, served over gRPC and HTTP.

The Python client can be imported from here, without torch::

    from turret import AsyncTurretClient, TurretClient, TurretRpcError
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turret.clients.aio import AsyncTurretClient
    from turret.clients.channel import Tls
    from turret.clients.client import TurretClient
    from turret.clients.errors import TurretRpcError
    from turret.clients.requests import AdapterWeight

__version__ = "0.2.0"

__all__ = ["AdapterWeight", "AsyncTurretClient", "Tls", "TurretClient", "TurretRpcError"]

# Names that are imported at their first use, because the server and the trainer do not need them.
_PLACES = {
    "AdapterWeight": "requests",
    "AsyncTurretClient": "aio",
    "Tls": "channel",
    "TurretClient": "client",
    "TurretRpcError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_quietly_imported(f"turret.clients.{_PLACES[name]}"), name)


def _quietly_imported(module: str) -> Any:
    """The module, imported so that gRPC does not log lines that only repeat the errors of calls.

    gRPC reads ``GRPC_VERBOSITY`` when it is loaded. If the variable is already set, or gRPC is
    already loaded, its log stays as it is.
    """
    is_unset = "GRPC_VERBOSITY" not in os.environ
    if is_unset:
        os.environ["GRPC_VERBOSITY"] = "NONE"
    try:
        return importlib.import_module(module)
    finally:
        if is_unset:
            # Do not pass the variable on to programs that this one starts.
            del os.environ["GRPC_VERBOSITY"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
