"""An answer as it grows, from a synchronous or an asyncio call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self

import grpc
import grpc.aio

from turret.clients.calls.progress import AnswerProgress
from turret.clients.calls.settings import CallSettings, closed_under_a_call
from turret.clients.calls.unary import is_task_cancelled, told_when_closed
from turret.clients.errors import TurretRpcError, UnavailableError
from turret.clients.messages.results import Chunk


class GenerationStream(Iterator[Chunk]):
    """An answer as it grows: an iterator of ``Chunk``, once through. ``generate_stream`` makes it.

    Closing it, or leaving its ``with`` block, stops the request; who iterates to the end, where
    the last chunk has a ``finish_reason``, need do neither. A request that fails is sent again
    where that may help, and goes on where it broke off. Where a server that stops has ended the
    answer, and none goes on, the last chunk's ``finish_reason`` is ``CANCELLED``, and the next step
    raises ``AnswerCutError``.
    """

    def __init__(
        self,
        start: Callable[[Any, float | None], Any],
        progress: AnswerProgress,
        settings: CallSettings,
    ) -> None:
        """Send the request.

        Args:
            start: Sends a request, with what is left of its deadline in seconds, and returns its
                responses, which are a ``grpc.Call`` too.
            progress: What has come of the answer.
            settings: What the call carries.
        """
        self._start = start
        self._progress = progress
        self._settings = settings
        self._closed = threading.Event()
        self._cut_by: TurretRpcError | None = None
        self._call = start(progress.request(), progress.timeout())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        while True:
            if self._cut_by is not None:
                failure, self._cut_by = self._cut_by, None
                raise failure
            if self._closed.is_set():
                raise StopIteration
            try:
                return self._progress.take(next(self._call))
            except grpc.RpcError as error:
                if self._closed.is_set():
                    raise StopIteration from None
                failure = self._settings.failure(error, self._progress.seconds)
            except UnavailableError as error:
                failure = error
            if self._progress.is_whole and isinstance(failure, UnavailableError):
                raise StopIteration
            delay = self._progress.delay_after(failure)
            if delay is None:
                self.close()
                if self._progress.cut is None:
                    raise failure
                self._cut_by = self._progress.end_of_cut(failure)
                return self._progress.cut
            self._restart(delay)

    def _restart(self, delay: float) -> None:
        if not self._closed.wait(delay):
            if self._settings.closed.is_set():
                raise closed_under_a_call()
            self._call = self._start(self._progress.request(), self._progress.timeout())
            if self._closed.is_set():
                self._call.cancel()

    def close(self) -> None:
        """Stop the request. Idempotent, also from another thread; iteration then ends."""
        self._closed.set()
        self._cut_by = None
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncGenerationStream(AsyncIterator[Chunk]):
    """An answer as it grows, as ``GenerationStream``, for ``async for`` and ``async with``."""

    def __init__(
        self,
        start: Callable[[Any, float | None], grpc.aio.UnaryStreamCall],
        progress: AnswerProgress,
        settings: CallSettings,
    ) -> None:
        """Send the request; arguments are those of :class:`GenerationStream`."""
        self._start = start
        self._progress = progress
        self._settings = settings
        self._is_closed = False
        self._cut_by: TurretRpcError | None = None
        self._call = start(progress.request(), progress.timeout())
        self._responses = aiter(self._call)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while True:
            if self._cut_by is not None:
                failure, self._cut_by = self._cut_by, None
                raise failure
            if self._is_closed:
                raise StopAsyncIteration
            try:
                with told_when_closed(self._settings):
                    chunk = await anext(self._responses)
                return self._progress.take(chunk)
            except asyncio.CancelledError:
                if self._is_closed and not is_task_cancelled():
                    raise StopAsyncIteration from None
                raise
            except grpc.aio.AioRpcError as error:
                failure = self._settings.failure(error, self._progress.seconds)
            except UnavailableError as error:
                failure = error
            if self._progress.is_whole and isinstance(failure, UnavailableError):
                raise StopAsyncIteration
            delay = self._progress.delay_after(failure)
            if delay is None:
                await self.aclose()
                if self._progress.cut is None:
                    raise failure
                self._cut_by = self._progress.end_of_cut(failure)
                return self._progress.cut
            await self._restart(delay)

    async def _restart(self, delay: float) -> None:
        await asyncio.sleep(delay)
        if not self._is_closed:
            if self._settings.closed.is_set():
                raise closed_under_a_call()
            self._call = self._start(self._progress.request(), self._progress.timeout())
            self._responses = aiter(self._call)

    async def aclose(self) -> None:
        """Stop the request. Idempotent; iteration then ends."""
        self._is_closed = True
        self._cut_by = None
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()
