"""Connections over HTTP: how long a head may take, and which certificates clients see."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from turret.server.api.access.watched_files import WatchedFiles
from turret.server.config import SecurityConfig
from turret.server.http.exchange.chunks import EXTENSION, Chunks
from turret.server.http.exchange.listener import Listener

# From the connection, or from the first byte of a later request, to the end of its head.
HEAD_SECONDS = 10.0
# As the gRPC door allows for metadata. The parser lets a larger one pass if it comes in one piece.
MAX_HEAD_BYTES = 16 << 10


class Connection(H11Protocol):
    """A connection that is closed if the head of a request takes too long to arrive.

    Args:
        listener: Where it came in.
        arguments: What uvicorn gives every connection.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def __init__(self, listener: Listener, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._listener = listener
        self._answers, self.app = self.app, self._answer

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        """The application, told how to send chunks."""
        assert self.cycle is not None
        if scope["type"] == "http" and scope["http_version"] == "1.1":
            scope.setdefault("extensions", {})[EXTENSION] = Chunks(self.cycle)
        await self._answers(scope, receive, send)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # asyncio does so for sockets that say they are TCP, and accepted ones do not. Without it a
        # small write waits for the client's acknowledgement of the one before: 40 ms an event.
        accepted = transport.get_extra_info("socket")
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._listener.met(accepted.fileno())
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # A request under way, or one that is complete: uvicorn has its own timer after that.
        if self.cycle is not None and (not self.cycle.response_complete or self._is_idle()):
            self._forget_head()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def _is_idle(self) -> bool:
        return self.timeout_keep_alive_task is not None

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def tls_context(security: SecurityConfig) -> ssl.SSLContext | None:
    """TLS as the flags want it, mutual with ``--tls-client-ca``; None for plain text.

    The files are read again when they have changed, at the next connection.

    Raises:
        OSError: A file cannot be read, or the files do not fit together.
    """
    if security.tls_cert is None or security.tls_key is None:
        return None
    paths = [security.tls_cert, security.tls_key]
    if security.tls_client_ca is not None:
        paths.append(security.tls_client_ca)
    files = WatchedFiles(paths, lambda: _context(security), "certificates")

    def choose(connection: Any, name: str | None, context: ssl.SSLContext) -> None:
        """Called in every handshake, before a certificate is shown."""
        files.look()
        connection.context = files.newest

    first = files.newest
    first.sni_callback = choose
    return first


def _context(security: SecurityConfig) -> ssl.SSLContext:
    assert security.tls_cert is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(security.tls_cert, security.tls_key)
    if security.tls_client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(security.tls_client_ca)
    return context
