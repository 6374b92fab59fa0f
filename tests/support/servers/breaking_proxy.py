"""A proxy that breaks connections in the middle of what a server says."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator

_PIECE = 256


class BreakingProxy:
    """Forwards TCP connections and resets each after some bytes from the server.

    Attributes:
        address: Where it listens.
        num_broken: Connections that it has broken.
        after_bytes: Each connection draws after how many bytes it breaks from this range; None lets
            all live.
    """

    def __init__(self, target: str, after_bytes: tuple[int, int] | None, seed: int) -> None:
        host, port = target.rsplit(":", 1)
        self._target = host, int(port)
        self.after_bytes = after_bytes
        self.num_broken = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:" + str(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        with self._lock:
            for connection in self._open:
                _reset(connection)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            with self._lock:
                self._open |= {near, far}
                left = None if self.after_bytes is None else self._random.randint(*self.after_bytes)
            threading.Thread(target=self._pump, args=(near, far, None), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, left), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, left: int | None) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                if left is not None and len(piece) > left:
                    target.sendall(piece[:left])
                    with self._lock:
                        self.num_broken += 1
                    break
                target.sendall(piece)
                left = None if left is None else left - len(piece)
        _reset(source)
        _reset(target)


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()


@contextlib.contextmanager
def breaking_proxy(
    target: str, after_bytes: tuple[int, int] | None, seed: int = 0
) -> Iterator[BreakingProxy]:
    """A running proxy."""
    proxy = BreakingProxy(target, after_bytes, seed)
    try:
        yield proxy
    finally:
        proxy.close()
