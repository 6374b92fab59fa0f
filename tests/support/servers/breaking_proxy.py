"""A proxy that breaks connections, or goes silent, in the middle of a server's response."""

from __future__ import annotations

import contextlib
import random
import socket
import threading

_PIECE = 256


class BreakingProxy:
    """Forwards TCP connections and resets each after some bytes from the server.

    With ``is_silent``, the proxy keeps connections open instead, but forwards nothing more.

    Attributes:
        address: The address of the proxy.
        num_broken: The number of broken connections.
        after_bytes: The range of the number of bytes after which a connection breaks; None breaks
            none.
    """

    def __init__(
        self, target: str, after_bytes: tuple[int, int] | None, *, is_silent: bool = False
    ) -> None:
        host, port = target.rsplit(":", 1)
        self._target = host, int(port)
        self.after_bytes = after_bytes
        self.num_broken = 0
        self._is_silent = is_silent
        self._silent: set[socket.socket] = set()
        self._random = random.Random(0)
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:" + str(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> BreakingProxy:
        return self

    def __exit__(self, *_: object) -> None:
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
                if source in self._silent:
                    continue
                if left is not None and len(piece) > left:
                    target.sendall(piece[:left])
                    with self._lock:
                        self.num_broken += 1
                        if self._is_silent:
                            self._silent |= {source, target}
                            continue
                    break
                target.sendall(piece)
                left = None if left is None else left - len(piece)
        _reset(source)
        _reset(target)


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
