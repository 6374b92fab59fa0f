"""Whose a request is that came through the ingress."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address

from starlette.types import Scope

FORWARDED_FOR = "x-forwarded-for"


def client_address(values: Iterable[str]) -> str | None:
    """The address of who called the ingress; None if that does not say.

    Args:
        values: Those of every ``x-forwarded-for``, in order. The ingress writes the last one, and
            what comes before is what its caller claims.
    """
    last = None
    for value in values:
        last = value
    if last is None:
        return None
    try:
        return str(ip_address(last.rpartition(",")[2].strip()))
    except ValueError:
        return None


def as_peer(address: str) -> str:
    """An address in gRPC's words; its port is not known."""
    return f"ipv6:[{address}]:0" if ":" in address else f"ipv4:{address}:0"


def from_client(scope: Scope) -> Scope:
    """An HTTP request as its client made it, and not as the ingress did."""
    name = FORWARDED_FOR.encode()
    sent = (value.decode("latin-1") for key, value in scope["headers"] if key == name)
    address = client_address(sent)
    return scope if address is None else {**scope, "client": (address, 0)}
