"""Serves the metrics as text over HTTP.

A separate thread with its own event loop answers, so that calls do not delay scrapes, and scrapes
do not delay calls. Every connection has a limit of a few seconds and a few kilobytes, and the
number of open connections is limited.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Mapping
from http import HTTPStatus

from prometheus_client.exposition import choose_encoder

from turret.server import log
from turret.server.api.access import TokenTable, bearer_token, is_own_host
from turret.server.basics.settings import is_local_address, split_address
from turret.server.metrics import Metrics

_log = logging.getLogger(__name__)

PATH = "/metrics"
ROLE = "metrics"
MAX_CONNECTIONS = 16
MAX_REQUEST_BYTES = 8192
# Time limit from the connection to the last byte of the answer.
TIMEOUT_SECONDS = 5.0


class MetricsServer:
    """Answers ``GET /metrics`` from a thread of its own.

    Args:
        metrics: The metrics to serve.
        address: ``HOST:PORT``; port 0 picks a free one.
        tokens: If one of them has the role ``metrics``, only such tokens may read the metrics.
        num_ports: The number of ports to try, beginning with that of the address.

    Raises:
        OSError: The address cannot be bound.
    """

    def __init__(
        self,
        metrics: Metrics,
        address: str,
        tokens: TokenTable | None = None,
        *,
        num_ports: int = 1,
    ) -> None:
        host, port = split_address(address)
        self._socket = _listener(host, port, num_ports)
        is_guarded = tokens is not None and tokens.has_role(ROLE)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._socket.getsockname()[1]}"
        # A web page could otherwise read the metrics of the machine on which its browser runs.
        self._checks_host = is_local_address(address) and not is_guarded
        if not is_local_address(address) and not is_guarded:
            _log.warning(
                "metrics are readable without a token", extra=log.fields(address=self.address)
            )
        self._metrics = metrics
        self._tokens = tokens
        self._open: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, drop open connections and wait for the thread."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._listen())

    async def _listen(self) -> None:
        server = await asyncio.start_server(
            self._accept, sock=self._socket, limit=MAX_REQUEST_BYTES, backlog=MAX_CONNECTIONS
        )
        try:
            await self._stop.wait()
        finally:
            server.close()
            for task in self._open:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            if len(self._open) >= MAX_CONNECTIONS:
                return
            self._open.add(task)
            # A client that disconnects, is too slow or sends too long a head gets no answer.
            gone = (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError)
            with contextlib.suppress(*gone):
                async with asyncio.timeout(TIMEOUT_SECONDS):
                    head = await reader.readuntil(b"\r\n\r\n")
                    # Make drain() wait until the system has taken all bytes.
                    writer.transport.set_write_buffer_limits(0)
                    writer.write(self._answer(head))
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        finally:
            self._open.discard(task)
            writer.transport.abort()

    def _answer(self, head: bytes) -> bytes:
        lines = head.decode("latin-1").split("\r\n")
        words = lines[0].split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _response(HTTPStatus.BAD_REQUEST)
        headers: dict[str, str] = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers.setdefault(name.strip().lower(), value.strip())
        if words[0] not in ("GET", "HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET, HEAD"})
        if words[1].partition("?")[0] != PATH:
            return _response(HTTPStatus.NOT_FOUND)
        if self._checks_host and not is_own_host(headers.get("host", "")):
            return _response(HTTPStatus.MISDIRECTED_REQUEST)
        refusal = self._refusal(headers.get("authorization", ""))
        if refusal is not None:
            return refusal
        encode, content_type = choose_encoder(headers.get("accept", ""))
        body = encode(self._metrics.registry)
        answer = _response(HTTPStatus.OK, {"Content-Type": content_type}, body)
        return answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if words[0] == "HEAD" else answer

    def _refusal(self, authorization: str) -> bytes | None:
        if self._tokens is None or not self._tokens.has_role(ROLE):
            return None
        roles = self._tokens.roles_of(bearer_token(authorization) or "")
        if roles is None:
            return _response(HTTPStatus.UNAUTHORIZED, {"WWW-Authenticate": "Bearer"})
        if ROLE not in roles:
            return _response(HTTPStatus.FORBIDDEN)
        return None


def _listener(host: str, port: int, num_ports: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last = min(port + num_ports, 65536) - 1
    while True:
        try:
            return socket.create_server((host, port), family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port >= last:
                raise
            port += 1


def _response(
    status: HTTPStatus, headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> bytes:
    body = f"{status.phrase}\n".encode() if body is None else body
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body
