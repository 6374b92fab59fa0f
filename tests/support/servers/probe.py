"""A health check of a server."""

from __future__ import annotations

from turret.clients.channel import Tls
from turret.clients.errors import TurretRpcError
from turret.clients.verbs.health import ask


def is_serving(
    address: str, service: str = "", *, tls: Tls | None = None, token: str | None = None
) -> tuple[bool, str]:
    """Whether ``service`` (empty: the whole server) answers SERVING, and its answer."""
    try:
        answer = ask(address, service, timeout_seconds=5.0, tls=tls, token=token)
    except TurretRpcError as error:
        answer = error.code.name
    return answer == "SERVING", answer
