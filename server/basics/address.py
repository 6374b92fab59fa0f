"""Addresses that a server listens on."""

from __future__ import annotations

import ipaddress


def split_address(address: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[V6]:PORT`` as (host without brackets, port).

    Raises:
        ValueError: No port, a port outside 0..65535, or a bare IPv6 host.
    """
    if address == "unix:":
        raise ValueError("unix: needs a path, as unix:/run/turret.sock")
    scheme, is_url, _ = address.partition("://")
    if is_url and scheme.isalpha():
        raise ValueError(f"{address!r} is not HOST:PORT: leave {scheme}:// out")
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT with a port from 0 to 65535")
    if ":" in host and not bracketed:
        raise ValueError(f"{address!r}: write an IPv6 host in brackets, as [::1]:50051")
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
