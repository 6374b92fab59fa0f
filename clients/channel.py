"""The connection of a client to a server: address, TLS, channel."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from turret.clients.fields import ArgumentTypeError, ArgumentValueError, not_of_type
from turret.clients.words import say

DEFAULT_ADDRESS = "127.0.0.1:50051"
_OPTIONS: tuple[tuple[str, int], ...] = (
    # Logprobs with alternatives for a long prompt exceed gRPC's own limit of 4 MiB.
    ("grpc.max_receive_message_length", 64 << 20),
    # During a call, detect within half a minute that the server or a proxy has vanished, so that
    # the answer can continue elsewhere. Servers treat more frequent pings as abuse.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Apply the same limit to the pings with which gRPC measures the connection. While such a ping
    # is pending, no keepalive ping is sent.
    ("grpc.http2.ping_timeout_ms", 20_000),
    # Keep pinging however long the server is silent.
    ("grpc.http2.max_pings_without_data", 0),
    # Reconnect soon after the server returns; gRPC's own maximum is two minutes.
    ("grpc.max_reconnect_backoff_ms", 4_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How to verify the server and, with ``certificate`` and ``key``, identify the client (mTLS).

    Attributes:
        ca: PEM root certificates that must sign the server's; None means the system's.
        certificate: PEM chain of the client, or None.
        key: PEM private key of the client, or None.
        server_name: The name in the server's certificate, if it differs from the address.
    """

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            missing, other = ("key", "certificate")[:: 1 if self.key is None else -1]
            raise ArgumentValueError(missing, say("REQUIRED_WITH", other=other))

    @classmethod
    def from_files(
        cls,
        *,
        ca: str | os.PathLike[str] | None = None,
        certificate: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        server_name: str | None = None,
    ) -> Tls:
        """Read the PEM files.

        Raises:
            OSError: A file cannot be read.
            TypeError: An argument has the wrong type.
            ValueError: Only one of certificate and key is given.
        """
        files = {"ca": ca, "certificate": certificate, "key": key}
        pems = {name: _read_pem(name, path) for name, path in files.items() if path is not None}
        return cls(**pems, server_name=server_name)


def _read_pem(name: str, path: str | os.PathLike[str]) -> bytes:
    if not isinstance(path, str | os.PathLike):
        # Do not repeat the value, which may be PEM itself.
        kind = type(path).__name__
        raise ArgumentTypeError(name, say("WRONG_TYPE", expected="the path of a file", value=kind))
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise type(error)(f"{name}: {path}: {error.strerror}") from None


def check_address(address: object, tls: object, name: str = "address") -> None:
    """Reject a URL, and an address without a port. gRPC reports other faults at the first call.

    Args:
        address: The server's address.
        tls: How to verify the server; None means a plain connection.
        name: The name of the argument, for the error.

    Raises:
        ArgumentTypeError: An argument has the wrong type.
        ArgumentValueError: The address is a URL, or has no port and no TLS.
    """
    if not isinstance(address, str):
        raise not_of_type(name, "HOST:PORT", address)
    if not isinstance(tls, Tls | None):
        raise not_of_type("tls", "a Tls or None", tls)
    scheme, _, rest = address.partition("://")
    if rest and scheme.lower() in ("http", "https"):
        text = say("ADDRESS_WITH_SCHEME", value=address, scheme=f"{scheme}://")
        raise ArgumentValueError(name, text)
    # With TLS, gRPC's default port 443 is a usual choice.
    if ":" not in address and tls is None:
        raise ArgumentValueError(name, say("ADDRESS_WITHOUT_PORT", value=address))


def open_channel(library: Any, address: str, tls: Tls | None) -> Any:
    """A channel of ``grpc`` or ``grpc.aio``; it connects at the first call."""
    options = _options(address, tls)
    if tls is None:
        return library.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
    return library.secure_channel(address, credentials, options=options)


def _options(address: str, tls: Tls | None) -> list[tuple[str, int | str]]:
    options: list[tuple[str, int | str]] = [*_OPTIONS]
    listed = address.removeprefix("ipv4:").removeprefix("ipv6:").split(",")
    if len(listed) > 1:
        # By default gRPC uses the whole list as the server's name, which proxies reject and no
        # certificate contains.
        options.append(("grpc.default_authority", listed[0]))
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options
