"""turret: many adapters of many methods on one 4-bit base model, served over gRPC.

The Python client can be taken from here, without torch::

    from turret import AsyncTurretClient, TurretClient, TurretRpcError
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turret.clients.aio import AsyncTurretClient
    from turret.clients.channel import Tls
    from turret.clients.client import TurretClient
    from turret.clients.errors import TurretRpcError
    from turret.clients.messages.mix import AdapterWeight

__version__ = "0.1.0"

__all__ = ["AdapterWeight", "AsyncTurretClient", "Tls", "TurretClient", "TurretRpcError"]

# Loaded when first asked for: the server and the trainer need none of them.
_PLACES = {
    "AdapterWeight": "messages.mix",
    "AsyncTurretClient": "aio",
    "Tls": "channel",
    "TurretClient": "client",
    "TurretRpcError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"turret.clients.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
