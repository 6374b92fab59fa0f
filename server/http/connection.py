"""Connections: limits on their number, time and bytes; chunks of streams; TLS certificates."""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from asyncio import constants, sslproto
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from turret.server.api.access import WatchedFiles
from turret.server.config import SecurityConfig

# The same limit as for a gRPC message.
MAX_BODY_BYTES = 4 << 20
# Time limit for a request's head, from the connection or from the first byte of a later request.
HEAD_SECONDS = 10.0
# The same as the hard limit on gRPC metadata.
MAX_HEAD_BYTES = 16 << 10
# Maximum number of headers of one request, and of requests that may arrive before the answer to an
# earlier one. Both take time and memory far beyond their bytes.
MAX_HEADERS = 128
MAX_SENT_AHEAD = 8
# A client that keeps sending after a rejection gets this much time to read the answer, and may
# send this many bytes meanwhile. Closing the connection earlier would reset it and could lose the
# answer.
LINGER_SECONDS = 5.0
LINGER_BYTES = MAX_BODY_BYTES
# Limit on the bytes of chunk framing in a request. A body in chunks of a few bytes takes many
# times its size on the wire, and each chunk takes time. Handlers limit the bodies themselves.
MAX_FRAMING_BYTES = 4 << 20
# A connection receives at most this much at once (10,000 chunks of one byte), so that others get a
# turn before the parser continues; asyncio's default is 256 KiB.
_PIECE_BYTES = 64 << 10
# Time limit for the TLS handshake, from the connection on; asyncio's default is a minute.
HANDSHAKE_SECONDS = 10.0
# Each TLS connection has a buffer of this size from its handshake on; asyncio's default is 256 KiB.
_TLS_BUFFER_BYTES = 32 << 10
# Held-back bytes beyond this limit are sent at once.
_MAX_HELD_BYTES = 64 << 10
# Name of the ASGI extension that holds a request's ``Chunks``.
EXTENSION = "turret.chunks"


class Connection(HttpToolsProtocol):
    """A connection whose requests have limits of time and bytes.

    A connection is closed if a head takes too long or has too many headers, or if a head or the
    framing of a body has too many bytes. If the answer is sent before the request has been read
    completely, the rest of the request is dropped unparsed. If too many requests are sent ahead,
    the excess is dropped as well, and the connection is closed once the others are answered.

    Args:
        arguments: The arguments that uvicorn passes to every connection.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Bytes received so far of the current head, or of the framing of the body after it.
        self._num_bytes = 0
        self._is_in_head = True
        self._is_last = False
        # Whether no more requests are parsed.
        self._is_full = False
        self._num_dropped = 0
        self._running: RequestResponseCycle | None = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, functools.partial(self._answer, cycle, app))

    async def _answer(
        self, cycle: RequestResponseCycle, app: Any, scope: Any, receive: Any, send: Any
    ) -> None:
        """Run the application; for HTTP/1.1, with the extension that sends chunks."""
        self._running = cycle
        is_old = scope["http_version"] == "1.0"
        if not is_old:
            # Copy the scope, because the cycle refers to the original one, and the chunks refer to
            # the cycle. Otherwise, each request would keep the buffers of its connection until the
            # next garbage collection.
            scope = {**scope, "extensions": {EXTENSION: Chunks(cycle)}}

        async def framed(message: Any) -> None:
            """Send a message of the application, and announce the end of the connection.

            The connection ends after an answer that begins before its request has been read. If too
            many requests were sent ahead, it ends after the last answer.
            """
            is_start = message["type"] == "http.response.start"
            if is_old:
                # uvicorn does not support answers that end with their connection, so hide the
                # missing length.
                cycle.chunked_encoding = False
                cycle.expected_content_length = len(message.get("body", b""))
            is_end = cycle.more_body or (self._is_full and not self.pipeline)
            self._is_last = (is_start and is_end) or self._is_last
            if not is_start or not self._is_last:
                await send(message)
                return
            headers = [*message.get("headers", ()), (b"connection", b"close")]
            await send({**message, "headers": headers})
            # uvicorn would close the connection at once, and the client might lose the answer.
            cycle.keep_alive = True

        await app(scope, receive, framed)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # With TLS, asyncio passes on no more than its buffer (see ``tls_context``).
        transport.max_size = _PIECE_BYTES
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._is_full or self._linger_timer is not None:
            self._num_dropped += len(data)
            if self._num_dropped > LINGER_BYTES:
                self.transport.abort()
            return
        self._num_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing() or self._is_full:
            return
        # Allow one piece more: a callback may have reset the count in the middle of a piece.
        most = (MAX_HEAD_BYTES if self._is_in_head else MAX_FRAMING_BYTES) + _PIECE_BYTES
        if self._num_bytes > most:
            self.send_400_response("Too many bytes.")
            return
        # A request is running or has completed: from here on, uvicorn's own timer applies.
        is_idle = self.timeout_keep_alive_task is not None
        if self.cycle is not None and (not self.cycle.response_complete or is_idle):
            self._forget_head()
        else:
            self._await_head()

    def on_message_begin(self) -> None:
        if len(self.pipeline) == MAX_SENT_AHEAD:
            self._is_full = True
            raise ValueError("too many requests sent ahead")
        super().on_message_begin()
        self._num_bytes, self._is_in_head = 0, True

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._num_bytes, self._is_in_head = 0, False

    def on_header(self, name: bytes, value: bytes) -> None:
        # uvicorn would treat a trailer after the body as a header.
        if self._is_in_head:
            if len(self.headers) == MAX_HEADERS:
                raise ValueError("too many headers")
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._num_bytes -= len(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._num_bytes, self._is_in_head = 0, True

    def send_400_response(self, msg: str) -> None:
        # The client would take this for the answer to a request that it sent earlier.
        if not self._is_full:
            super().send_400_response(msg)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_last and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._linger_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        # uvicorn ends only the request that was sent last.
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)
        # uvicorn keeps the timer of a connection that the client reset, which keeps the connection
        # and its TLS buffers in memory for another 75 seconds.
        self._unset_keepalive_if_required()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class Chunks:
    """Writes all bytes of one turn of the event loop as one chunk.

    Events bypass uvicorn's layers, and tokens that have piled up are sent together. The head and
    the last chunk are sent through uvicorn, which does not count the bytes between them.

    Args:
        cycle: The request that is answered over HTTP/1.1, without a length.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._loop = asyncio.get_running_loop()
        self._held: list[bytes] = []
        self._num_bytes = 0

    async def write(self, data: bytes) -> None:
        """Send bytes before the event loop waits again.

        Waits while the client does not read.
        """
        if not self._held:
            self._loop.call_soon(self.flush)
        self._held.append(data)
        self._num_bytes += len(data)
        cycle = self._cycle
        if cycle.flow.write_paused or self._num_bytes > _MAX_HELD_BYTES:
            self.flush()
            if cycle.flow.write_paused and not cycle.disconnected:
                await cycle.flow.drain()

    def flush(self) -> None:
        """Send the held bytes now."""
        if not self._held:
            return
        data = b"".join(self._held)
        self._held.clear()
        self._num_bytes = 0
        if not (self._cycle.disconnected or self._cycle.response_complete):
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class _Accepted(socket.socket):
    """The socket of a connection, which reports when it is closed."""

    __slots__ = ("on_close",)

    on_close: Callable[[], None]

    def close(self) -> None:
        was_open = self.fileno() >= 0
        super().close()
        if was_open:
            self.on_close()


class Listener(socket.socket):
    """Accepts connections up to a limit; further ones are closed at once.

    asyncio can use it like any listening socket. It counts the open connections that it has
    accepted, including those whose handshake is still running. It belongs to one event loop.

    Args:
        bound: The listening socket, which this one replaces.
        most: The maximum number of open connections.
    """

    def __init__(self, bound: socket.socket, most: int) -> None:
        super().__init__(bound.family, bound.type, bound.proto, fileno=bound.detach())
        self._most = most
        self.num_open = 0

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection.

        Raises:
            ConnectionAbortedError: The connection exceeded the limit and was closed; asyncio
                continues to accept.
            OSError: See ``socket.accept``.
        """
        plain, address = super().accept()
        # asyncio sets TCP_NODELAY only on sockets with this explicit protocol. Without it, each
        # event would wait 40 ms for the acknowledgement of the previous one.
        tcp = socket.IPPROTO_TCP
        accepted = _Accepted(self.family, self.type, tcp, fileno=plain.detach())
        accepted.on_close = self._ended
        self.num_open += 1
        if self.num_open > self._most:
            accepted.close()
            raise ConnectionAbortedError("too many connections")
        return accepted, address

    def _ended(self) -> None:
        self.num_open -= 1


class NewestContext(ssl.SSLContext):
    """Serves each connection with the newest certificates.

    A context resumes its own sessions without checking a client's certificate again. So every
    change of the certificates makes a new context, which resumes no session of the former one.

    Attributes:
        files: The context for the certificates in the files.
    """

    files: WatchedFiles[ssl.SSLContext]

    def wrap_bio(self, *args: Any, **settings: Any) -> ssl.SSLObject:
        """Begin a connection; asyncio calls this method for each one."""
        self.files.look()
        return self.files.newest.wrap_bio(*args, **settings)


def tls_context(security: SecurityConfig) -> ssl.SSLContext | None:
    """The TLS context that the flags describe; None if they do not enable TLS.

    With ``--tls-client-ca``, clients need a certificate too. After a file has changed, the next
    connection reads all of them again.

    Raises:
        OSError: A file cannot be read, or the files do not match each other.
    """
    if security.tls_cert is None or security.tls_key is None:
        return None
    paths = [security.tls_cert, security.tls_key]
    if security.tls_client_ca is not None:
        paths.append(security.tls_client_ca)
    # uvicorn has no options for these two settings, so change asyncio's own values.
    sslproto.SSLProtocol.max_size = _TLS_BUFFER_BYTES
    constants.SSL_HANDSHAKE_TIMEOUT = HANDSHAKE_SECONDS
    context = NewestContext(ssl.PROTOCOL_TLS_SERVER)
    context.files = WatchedFiles(paths, lambda: _context(security), "certificates")
    return context


def _context(security: SecurityConfig) -> ssl.SSLContext:
    assert security.tls_cert is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # An empty password keeps OpenSSL from asking for one at the terminal.
    context.load_cert_chain(security.tls_cert, security.tls_key, password=lambda: b"")
    if security.tls_client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(security.tls_client_ca)
    return context
