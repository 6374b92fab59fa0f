"""Runs the parts of one call beside each other."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")


async def together(work: Sequence[Coroutine[Any, Any, _T]], at_a_time: int) -> list[_T]:
    """What each returns, in order, with so many of them running at a time.

    What the first of them to fail raises is raised; the others are cancelled, and have ended.
    """
    places = asyncio.Semaphore(at_a_time)

    async def run(one: Coroutine[Any, Any, _T]) -> _T:
        async with places:
            return await one

    tasks = [asyncio.ensure_future(run(one)) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for one in work:
            one.close()
