"""An answer as it grows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import grpc

from turret.clients.calls.aio import Flag, StreamClosedError, waiting
from turret.clients.calls.progress import AnswerProgress
from turret.clients.calls.settings import CallSettings, closed_under_a_call
from turret.clients.errors import TurretRpcError, UnavailableError
from turret.clients.messages.results import Chunk


class AsyncGenerationStream(AsyncIterator[Chunk]):
    """An answer as it grows: an iterator of ``Chunk``, which ``generate_stream`` returns.

    Closing the stream, or leaving its ``async with`` block, stops the request. A program that
    iterates to the end need not close it; the last chunk has a ``finish_reason``. If the request
    fails and a retry may help, the stream continues where it stopped. If a stopping server ended
    the answer and no other server continues it, the ``finish_reason`` of the last chunk is
    ``CANCELLED``, and the next iteration raises ``AnswerCutError``.
    """

    def __init__(
        self,
        start: Callable[[Any, float | None], Any],
        progress: AnswerProgress,
        settings: CallSettings,
    ) -> None:
        """Send the request.

        Args:
            start: Sends a request with the rest of its deadline in seconds. Returns its responses,
                which are also a ``grpc.Call``.
            progress: The part of the answer that has arrived.
            settings: The settings of the call.
        """
        self._start = start
        self._progress = progress
        self._settings = settings
        self._closed = Flag()
        self._waiting = waiting(settings, self._closed)
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
            if self._closed.is_set():
                raise StopAsyncIteration
            try:
                with self._waiting:
                    chunk = await anext(self._responses)
                return self._progress.take(chunk)
            except StreamClosedError:
                raise StopAsyncIteration from None
            except grpc.RpcError as error:
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
        if not await self._closed.wait(delay):
            if self._settings.closed.is_set():
                raise closed_under_a_call()
            self._call = self._start(self._progress.request(), self._progress.timeout())
            self._responses = aiter(self._call)
            if self._closed.is_set():
                self._call.cancel()

    async def aclose(self) -> None:
        """Stop the request, which ends the iteration. It may be called repeatedly, at any time."""
        self._closed.set()
        self._cut_by = None
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()
