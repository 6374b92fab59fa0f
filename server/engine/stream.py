"""The asyncio end of a request: an async iterator of its outputs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from turret.server.engine.request import Output
from turret.server.errors import TurretError


class Stream:
    """Outputs of one request, in order; the last carries ``finish``.

    Iterating raises the request's ``TurretError`` if it failed. Belongs to one event loop.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._items: deque[Output | TurretError] = deque()
        self._arrived = asyncio.Event()
        self._ended = False

    def deliver(self, item: Output | TurretError) -> None:
        """Add an item; called on the event loop."""
        self._items.append(item)
        self._arrived.set()

    def cancel(self) -> None:
        """Stop the request at the engine's next step. Idempotent; harmless when finished."""
        self._cancel()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Output:
        if self._ended:
            raise StopAsyncIteration
        while not self._items:
            self._arrived.clear()
            await self._arrived.wait()
        item = self._items.popleft()
        if isinstance(item, TurretError):
            self._ended = True
            raise item
        self._ended = item.finish is not None
        return item
