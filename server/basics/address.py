"""Addresses that a server listens on."""

from __future__ import annotations

import ipaddress

from turret.server.words import say


def split_address(address: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[V6]:PORT`` as (host without brackets, port).

    Raises:
        ValueError: No port, a port outside 0..65535, or a bare IPv6 host.
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    is_port = port.isascii() and port.isdigit() and int(port) <= 65535
    if not colon or not host or not is_port or (":" in host and not bracketed):
        raise ValueError(say("NOT_AN_ADDRESS", value=address))
    return (host[1:-1] if bracketed else host), int(port)


def is_local_address(address: str) -> bool:
    """Whether only this machine can connect: loopback or a unix socket."""
    if address.startswith("unix:"):
        return True
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
