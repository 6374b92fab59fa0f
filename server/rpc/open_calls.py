"""How many gRPC calls may be under way, whoever makes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from turret.server.errors import QueueFullError

# As many as one connection may have (server/rpc/server.py), so that no burst of one is cut.
MOST_CALLS = 1 << 14
# Of services that ask for no token: health (a watcher is a call that never ends) and reflection.
MOST_OPEN_CALLS = 4096


class OpenCalls:
    """Counts the calls of all connections. Belongs to one event loop."""

    def __init__(self) -> None:
        # By whether the service asks for no token.
        self._counts = {True: 0, False: 0}

    @contextlib.contextmanager
    def hold(self, *, is_open: bool) -> Iterator[None]:
        """Count a call while the block runs.

        Args:
            is_open: Whether its service asks for no token; such calls have a bound of their own,
                and keep nobody else out.

        Raises:
            QueueFullError: There are as many as there may be.
        """
        most = MOST_OPEN_CALLS if is_open else MOST_CALLS
        if self._counts[is_open] >= most:
            raise QueueFullError(f"{most} calls are under way already")
        self._counts[is_open] += 1
        try:
            yield
        finally:
            self._counts[is_open] -= 1
