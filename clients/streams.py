"""An answer as it grows, from a synchronous or an asyncio call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self

import grpc
import grpc.aio

from turret.clients.errors import TurretRpcError
from turret.clients.messages.results import Chunk
from turret.clients.retries import Retries


class GenerationStream(Iterator[Chunk]):
    """An answer as it grows. Closing it, or leaving its ``with`` block, stops the request.

    A request that fails before its first chunk is sent again where that may help; one that fails
    later is not, since text has been seen.

    Args:
        start: Sends the request, with what is left of its deadline in seconds, and returns its
            responses, which are a ``grpc.Call`` too.
        retries: The tries that are left.
    """

    def __init__(self, start: Callable[[float | None], Any], retries: Retries) -> None:
        self._start = start
        self._retries = retries
        self._has_begun = False
        self._closed = threading.Event()
        self._call = start(retries.timeout())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        while True:
            if self._closed.is_set():
                raise StopIteration
            try:
                chunk = Chunk.from_proto(next(self._call))
            except grpc.RpcError as error:
                if self._closed.is_set():
                    raise StopIteration from None
                self._restart(TurretRpcError.from_grpc(error))
            else:
                self._has_begun = True
                return chunk

    def _restart(self, failure: TurretRpcError) -> None:
        delay = None if self._has_begun else self._retries.delay_after(failure)
        if delay is None:
            raise failure
        if not self._closed.wait(delay):
            self._call = self._start(self._retries.timeout())
            if self._closed.is_set():
                self._call.cancel()

    def close(self) -> None:
        """Stop the request. Idempotent, also from another thread; iteration then ends."""
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncGenerationStream(AsyncIterator[Chunk]):
    """An answer as it grows. Closing it, or leaving its ``async with``, stops the request.

    Arguments are those of :class:`GenerationStream`.
    """

    def __init__(
        self, start: Callable[[float | None], grpc.aio.UnaryStreamCall], retries: Retries
    ) -> None:
        self._start = start
        self._retries = retries
        self._has_begun = self._is_closed = False
        self._call = start(retries.timeout())
        self._responses = aiter(self._call)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while True:
            if self._is_closed:
                raise StopAsyncIteration
            try:
                chunk = Chunk.from_proto(await anext(self._responses))
            except grpc.aio.AioRpcError as error:
                await self._restart(TurretRpcError.from_grpc(error))
            else:
                self._has_begun = True
                return chunk

    async def _restart(self, failure: TurretRpcError) -> None:
        delay = None if self._has_begun else self._retries.delay_after(failure)
        if delay is None:
            raise failure
        await asyncio.sleep(delay)
        if not self._is_closed:
            self._call = self._start(self._retries.timeout())
            self._responses = aiter(self._call)

    async def aclose(self) -> None:
        """Stop the request. Idempotent; iteration then ends."""
        self._is_closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()
