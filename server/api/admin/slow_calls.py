"""Threads for calls that may take long: they must not hold up those that tokenise or list."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

_T = TypeVar("_T")


class SlowCalls:
    """Runs blocking calls off the event loop.

    Args:
        num_threads: Calls at a time; more wait their turn.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="turret-adapters")

    def close(self) -> None:
        """Start no further call; those that run end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(self, call: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """What ``call`` returns or raises. It goes on if the caller is cancelled meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, functools.partial(call, *args, **kwargs))

    async def open(self, call: Callable[[], _T], undo: Callable[[_T], object]) -> _T:
        """As ``run``; if the caller is cancelled meanwhile, what was opened is closed again."""
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
