"""The listening socket for HTTP, with limits on connections and on their TLS handshakes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

# Time limit for the TLS handshake, from the connection on; asyncio's default is a minute.
HANDSHAKE_SECONDS = 10.0


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
    """Accepts connections up to a bound; those beyond it are closed at once.

    asyncio may use it as any listening socket. It counts what it has accepted until that is
    closed, handshakes under way included. Belongs to one event loop.

    Args:
        family: ``socket.AF_INET`` or ``AF_INET6``.
        most: Connections open at once.
    """

    def __init__(self, family: socket.AddressFamily, most: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._most = most
        self._unmet: dict[int, asyncio.TimerHandle] = {}
        self.num_open = 0

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection.

        Raises:
            ConnectionAbortedError: It was one too many, and is closed; asyncio accepts on.
            OSError: As any socket's.
        """
        plain, address = super().accept()
        descriptor = plain.detach()
        accepted = _Accepted(self.family, self.type, self.proto, fileno=descriptor)
        accepted.on_close = lambda: self._ended(descriptor)
        self.num_open += 1
        if self.num_open > self._most:
            accepted.close()
            raise ConnectionAbortedError("too many connections")
        loop = asyncio.get_running_loop()
        self._unmet[descriptor] = loop.call_later(HANDSHAKE_SECONDS, _cut, accepted)
        return accepted, address

    def met(self, descriptor: int) -> None:
        """The handshake of a connection is over; without TLS that is so at once."""
        timer = self._unmet.pop(descriptor, None)
        if timer is not None:
            timer.cancel()

    def _ended(self, descriptor: int) -> None:
        self.num_open -= 1
        self.met(descriptor)


def _cut(accepted: socket.socket) -> None:
    # Do not close the socket: its transport now reads the end of the stream and closes it.
    try:
        accepted.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
