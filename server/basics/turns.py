"""Runs tenants' work in turn, on threads or on an event loop; limits what is open at a time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from turret.server.errors import QueueFullError
from turret.server.words import say

_T = TypeVar("_T")
_Jobs = dict[Future[Any], Callable[[], Any]]


class FairPool:
    """A pool of threads that serves tenants in turn, one job each.

    However many jobs one tenant has, another tenant's next job waits for at most one of them, in
    addition to those that already run.

    Args:
        threads: The threads. Nothing else may use them.
        most_of_one: The number of threads that one tenant may take, so that others do not wait for
            its running jobs; None for all. The tenant that everybody shares may take all.
    """

    def __init__(self, threads: ThreadPoolExecutor, most_of_one: int | None = None) -> None:
        self._threads = threads
        self._most_of_one = most_of_one
        self._running = Counter[bytes]()
        self._lock = threading.Lock()
        # The tenants that wait, in the order of their turns.
        self._waiting: dict[bytes, _Jobs] = {}

    async def run(self, tenant: bytes, job: Callable[[], _T]) -> _T:
        """The result of ``job``, which a thread calls at the tenant's turn.

        Args:
            tenant: The tenant of the job; empty for the tenant that everybody shares.
            job: The work. If the caller is cancelled before the job begins, it never runs, and its
                memory is free at once.

        Raises:
            RuntimeError: No thread can be started.
        """
        return await asyncio.wrap_future(self.submit(tenant, job))

    def close(self) -> None:
        """Start no more jobs, and cancel those that wait."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            waiting = [future for jobs in self._waiting.values() for future in jobs]
            self._waiting.clear()
        for future in waiting:
            future.cancel()

    def submit(self, tenant: bytes, job: Callable[[], _T]) -> Future[_T]:
        """Like ``run``, but returns the future of the result."""
        future: Future[_T] = Future()
        with self._lock:
            self._waiting.setdefault(tenant, {})[future] = job
        future.add_done_callback(functools.partial(self._forget, tenant))
        try:
            # The thread chooses its job when it starts.
            self._threads.submit(self._work)
        except RuntimeError:
            future.cancel()
            raise
        return future

    def _work(self) -> None:
        # Continue until no job may start. The job for which this thread was started may have been
        # left to the thread that runs another job of the same tenant.
        while (found := self._next()) is not None:
            tenant, future, job = found
            try:
                result = job()
            except BaseException as error:
                outcome = functools.partial(future.set_exception, error)
            else:
                outcome = functools.partial(future.set_result, result)
                del result
            with self._lock:
                self._running[tenant] -= 1
                if not self._running[tenant]:
                    del self._running[tenant]
            outcome()
            # An error's traceback refers to this frame, and the frame's future to the error. Break
            # the cycle, which would keep the job in memory until the next garbage collection.
            del found, future, job, outcome

    def _next(self) -> tuple[bytes, Future[Any], Callable[[], Any]] | None:
        """A tenant with its next job that was not cancelled; None if no job may start."""
        with self._lock:
            while (tenant := next(filter(self._may_run, self._waiting), None)) is not None:
                jobs = self._waiting.pop(tenant)
                future = next(iter(jobs))
                job = jobs.pop(future)
                if jobs:
                    self._waiting[tenant] = jobs
                if future.set_running_or_notify_cancel():
                    self._running[tenant] += 1
                    return tenant, future, job
        return None

    def _forget(self, tenant: bytes, future: Future[Any]) -> None:
        """Free the job of a future that was cancelled before the job began."""
        with self._lock:
            jobs = self._waiting.get(tenant, {})
            jobs.pop(future, None)
            if not jobs:
                self._waiting.pop(tenant, None)

    def _may_run(self, tenant: bytes) -> bool:
        most = self._most_of_one
        return not tenant or most is None or self._running[tenant] < most


class LoopTurns:
    """Lets waiting coroutines continue one per turn of the event loop, with tenants in turn.

    Other events are handled in between, however many coroutines become ready at once. Use an
    instance on one event loop only.
    """

    def __init__(self) -> None:
        # The tenants that wait, in the order of their turns.
        self._waiting: dict[bytes, deque[asyncio.Future[None]]] = {}

    async def wait(self, tenant: bytes) -> None:
        """Wait for the tenant's turn."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._next)
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        await turn

    def _next(self) -> None:
        while self._waiting:
            tenant = next(iter(self._waiting))
            turns = self._waiting.pop(tenant)
            turn = turns.popleft()
            if turns:
                self._waiting[tenant] = turns
            # The caller may have been cancelled meanwhile.
            if not turn.done():
                turn.set_result(None)
                break
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._next)


async def shielded(future: asyncio.Future[_T]) -> _T:
    """Wait for a future without cancelling it when the caller is cancelled.

    From Python 3.14, ``asyncio.shield`` logs a failure of the future after such a cancellation.
    """
    await asyncio.wait([future])
    return future.result()


async def completed(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of work that runs to its end before a cancelled caller continues."""
    task, is_cancelled = asyncio.ensure_future(work), False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            is_cancelled = True
    if not is_cancelled:
        return task.result()
    if not task.cancelled():
        # Retrieve the exception: nobody waits for it any more, and asyncio would log it.
        task.exception()
    raise asyncio.CancelledError


# Limits on what is open at the same time.


class Limit(NamedTuple):
    """A limit on the places that one key may take.

    Attributes:
        key: Identifies the places.
        most: The number of places.
        reason: The reason of the error if all places are taken.
        param: The parameter of that error's message that contains the number of places.
    """

    key: Hashable
    most: int
    reason: str
    param: str = "most"


class Places:
    """Counts what is open at the moment, by key. Belongs to one event loop."""

    def __init__(self) -> None:
        self._taken: dict[Hashable, int] = {}

    @contextlib.contextmanager
    def hold(self, *limits: Limit) -> Iterator[None]:
        """Take a place of each key while the block runs.

        Raises:
            QueueFullError: All places of a key are taken.
        """
        taken = self._taken
        for key, most, reason, param in limits:
            if taken.get(key, 0) >= most:
                raise QueueFullError(say(reason, **{param: most}))
        for limit in limits:
            taken[limit.key] = taken.get(limit.key, 0) + 1
        try:
            yield
        finally:
            for limit in limits:
                taken[limit.key] -= 1
                if not taken[limit.key]:
                    del taken[limit.key]
