"""Threads for calls that may take long, so that they do not delay tokenising or listing."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from turret.server.errors import QueueFullError
from turret.server.words import say

_T = TypeVar("_T")


class SlowCalls:
    """Runs blocking calls off the event loop.

    Args:
        num_threads: Calls at a time; more wait their turn.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._num_running = 0
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="turret-adapters")

    def close(self) -> None:
        """Start no further call; those that run end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(self, call: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Return or raise what ``call`` does. It continues if the caller is cancelled meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, functools.partial(call, *args, **kwargs))

    async def run_now(self, call: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """As ``run``, but without waiting for a turn.

        Raises:
            QueueFullError: All threads are taken.
        """
        if self._num_running >= self._num_threads:
            raise QueueFullError(say("TOO_MANY_CALLS", most=self._num_threads))

        def ended(_: Any) -> None:
            self._num_running -= 1

        self._num_running += 1
        running = asyncio.ensure_future(self.run(call, *args, **kwargs))
        # If the caller is cancelled the thread continues, and is counted until it is done.
        running.add_done_callback(ended)
        return await asyncio.shield(running)

    async def open(self, call: Callable[[], _T], undo: Callable[[_T], object]) -> _T:
        """As ``run``; if the caller is cancelled meanwhile, the result is closed again."""
        loop = asyncio.get_running_loop()
        opening = loop.run_in_executor(self._threads, call)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:

            def close(future: asyncio.Future[_T]) -> None:
                if not future.cancelled() and future.exception() is None:
                    self._threads.submit(undo, future.result())

            opening.add_done_callback(close)
            raise
