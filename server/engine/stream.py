"""The asyncio end of a request: an async iterator of its outputs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from turret.server.engine.scheduling.request import Output
from turret.server.errors import BudgetExceededError, TurretError
from turret.server.words import say

# Unread output of one answer, besides the item to be read next (which may hold a long prompt's
# logprobs).
MAX_UNREAD_BYTES = 8 << 20


class Stream:
    """Outputs of one request, in order; the last carries ``finish``.

    Iterating raises the request's ``TurretError`` if it failed, a ``BudgetExceededError`` if more
    of the answer waits to be read than ``MAX_UNREAD_BYTES``. Belongs to one event loop.

    Args:
        cancel: Ends the request.
        hold: Told of bytes that the request and what is unread of its answer take (negative:
            no longer take).
        num_bytes: What the request itself takes.
    """

    def __init__(
        self,
        cancel: Callable[[], None],
        hold: Callable[[int], None] = lambda _: None,
        num_bytes: int = 0,
    ) -> None:
        self._cancel = cancel
        self._hold = hold
        self._held = 0
        self._items: deque[tuple[Output | TurretError, int]] = deque()
        # The reader's future; cheaper per token than an asyncio.Event.
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._overflowed = False
        self._own_bytes = num_bytes
        self._keep(num_bytes)

    def deliver(self, item: Output | TurretError) -> None:
        """Add an item; called on the event loop."""
        if self._overflowed:
            return
        num_bytes = item.num_bytes if isinstance(item, Output) else 0
        self._items.append((item, num_bytes))
        self._keep(num_bytes)
        if self._held - self._own_bytes - self._items[0][1] > MAX_UNREAD_BYTES:
            self._overflow()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self) -> None:
        """Stop the request at the engine's next step. Idempotent; harmless when finished."""
        cancel = self._cancel
        self._let_go()
        cancel()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Output:
        if self._ended:
            raise StopAsyncIteration
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item, num_bytes = self._items.popleft()
        self._keep(-num_bytes)
        if isinstance(item, TurretError):
            self._end()
            raise item
        if item.finish is not None:
            self._end()
        return item

    def _overflow(self) -> None:
        self._overflowed = True
        self._items.clear()
        error = BudgetExceededError(say("ANSWER_UNREAD", max_unread_bytes=MAX_UNREAD_BYTES))
        self._items.append((error, 0))
        self.cancel()

    def _end(self) -> None:
        self._ended = True
        self._let_go()

    def _keep(self, num_bytes: int) -> None:
        self._held += num_bytes
        self._hold(num_bytes)

    def _let_go(self) -> None:
        """Stop accounting for memory and release the request, whatever items still arrive."""
        self._hold(-self._held)
        self._held = 0
        self._own_bytes = 0
        self._hold = lambda _: None
        self._cancel = lambda: None
