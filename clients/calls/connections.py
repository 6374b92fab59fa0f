"""How the two clients use gRPC: the asyncio one waits in its event loop, the other one blocks.

The course of a call is written once, as coroutines. On a :class:`BlockingConnection` they never
suspend, so :func:`completed` runs them like functions.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio

from turret.clients.channel import Tls, open_channel
from turret.clients.words import say
from turret.v1 import adapters_pb2_grpc, inference_pb2_grpc, training_pb2_grpc

# Time for the last event of a call that was cut short, which takes about 1 ms.
_CUT_SECONDS = 0.05
# gRPC's message for a request that it could not send.
_NOT_SENT = "Internal error from Core"
# Limit for the server's status, which explains the failure and arrives within milliseconds.
_STATUS_SECONDS = 2.0
_T = TypeVar("_T")


def completed(awaitable: Awaitable[_T]) -> _T:
    """The result of a coroutine that never suspends."""
    try:
        next(iter(awaitable.__await__()))
    except StopIteration as end:
        return end.value
    raise RuntimeError("the coroutine has suspended")


class Connection:
    """The channels of one client, and the stubs of the services.

    Args:
        address: The address of the server.
        admin_address: The address of the ``Adapters`` service; None means ``address``.
        tls: How to verify the server; None means a plain connection.

    Attributes:
        inference: The stub of the ``Inference`` service.
        adapters: The stub of the ``Adapters`` service.
        training: The stub of the ``Training`` service.
    """

    _library: Any

    def __init__(self, address: str, admin_address: str | None, tls: Tls | None) -> None:
        addresses = [address] if admin_address is None else [address, admin_address]
        self._channels = [open_channel(self._library, each, tls) for each in addresses]
        self.inference: Any = inference_pb2_grpc.InferenceStub(self._channels[0])
        self.adapters: Any = adapters_pb2_grpc.AdaptersStub(self._channels[-1])
        self.training: Any = training_pb2_grpc.TrainingStub(self._channels[0])

    def _close_stubs(self) -> None:
        self.inference = self.adapters = self.training = _ClosedStub()


class _ClosedStub:
    """Replaces a closed client's stub, with an error in terms of the client instead of gRPC's."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(say("CLIENT_CLOSED"))


class BlockingConnection(Connection):
    """The connection of the synchronous client."""

    _library = grpc

    async def close(self) -> None:
        """Cancel running calls, and make later ones raise RuntimeError."""
        self._close_stubs()
        for channel in self._channels:
            channel.close()

    async def answer(self, call: Any) -> Any:
        """The response of a call, which has already arrived."""
        return call

    def responses(self, call: Any) -> AsyncIterator[Any]:
        """The responses of a stream."""
        return _BlockingResponses(call)

    async def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait for an event, at most this long; returns whether it has happened."""
        return event.wait(seconds)


class _BlockingResponses(AsyncIterator[Any]):
    """The responses of a stream. Not a generator, because event loops keep track of those."""

    def __init__(self, call: Any) -> None:
        self._responses = iter(call)

    async def __anext__(self) -> Any:
        for response in self._responses:
            return response
        raise StopAsyncIteration


class AsyncConnection(Connection):
    """The connection of the asyncio client.

    Raises:
        RuntimeError: No event loop is running.
    """

    _library = grpc.aio

    def __init__(self, address: str, admin_address: str | None, tls: Tls | None) -> None:
        loop = _running_loop()
        super().__init__(address, admin_address, tls)
        self._cuts = _CutCalls()
        self.inference = _LoopStub(self.inference, loop, self._cuts)
        self.adapters = _LoopStub(self.adapters, loop, self._cuts)
        self.training = _LoopStub(self.training, loop, self._cuts)

    async def close(self) -> None:
        """Cancel running calls, and make later ones raise RuntimeError.

        If a call was cancelled just before, this takes up to 50 ms, so that gRPC has finished with
        the call before the event loop ends.
        """
        self._close_stubs()
        for channel in self._channels:
            await channel.close()
        await self._cuts.settle()

    async def answer(self, call: Any) -> Any:
        """The response of a call."""
        return await (answer_of(call) if isinstance(call, grpc.aio.StreamUnaryCall) else call)

    def responses(self, call: Any) -> AsyncIterator[Any]:
        """The responses of a stream."""
        return aiter(call)

    async def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait this long; returns whether the event has happened."""
        await asyncio.sleep(seconds)
        return event.is_set()


class _LoopStub:
    """An asyncio stub bound to its event loop: in another one, gRPC fails with an obscure error.

    Args:
        stub: gRPC's stub.
        loop: The event loop.
        cuts: Records each call that has ended.

    Raises:
        RuntimeError: No event loop is running, or a different one is.
    """

    def __init__(self, stub: object, loop: asyncio.AbstractEventLoop, cuts: _CutCalls) -> None:
        self._stub = stub
        self._loop = loop
        self._cuts = cuts

    def __getattr__(self, name: str) -> Any:
        if _running_loop() is not self._loop:
            raise RuntimeError(say("OTHER_EVENT_LOOP"))
        method = getattr(self._stub, name)

        def start(*arguments: Any, **options: Any) -> grpc.aio.Call:
            call = method(*arguments, **options)
            call.add_done_callback(self._cuts.note)
            return call

        return start


class _CutCalls:
    """When an asyncio client last cut a call short, and how long gRPC takes to handle that.

    gRPC handles the last event of a cancelled call a little later, through a queue that all event
    loops of the process share. If the loop has ended by then and any channel is still alive, the
    next loop finds the event and prints that the first loop is closed. No call and no channel
    reports that the event has been handled.
    """

    def __init__(self) -> None:
        self._last = -math.inf

    def note(self, call: grpc.aio.Call) -> None:
        """Record a call that has ended."""
        if call.cancelled():
            self._last = time.monotonic()

    async def settle(self) -> None:
        """Wait in this event loop for as long as such an event may arrive."""
        left = self._last + _CUT_SECONDS - time.monotonic()
        if left > 0:
            await asyncio.sleep(left)


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(say("NO_EVENT_LOOP")) from None


async def answer_of(call: grpc.aio.StreamUnaryCall[Any, Any]) -> Any:
    """Await the response to a stream of messages.

    If the server rejects the call before it has received all messages, gRPC's asyncio client fails
    to send the next one, and may replace the server's status with an INTERNAL of its own
    (https://github.com/grpc/grpc/issues/36066). This function raises the server's status.

    Raises:
        grpc.aio.AioRpcError: The call failed.
    """
    status: asyncio.Future[grpc.aio.AioRpcError] = asyncio.get_running_loop().create_future()

    # gRPC calls this for each status that the call receives, not only for the last one.
    def note(ended: grpc.aio.Call) -> None:
        error = _error_of(ended)
        if not _is_own(error) and not status.done():
            status.set_result(error)

    call.add_done_callback(note)
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        if _is_own(error):
            await asyncio.wait({status}, timeout=_STATUS_SECONDS)
            if status.done():
                raise status.result() from None
        raise


def _is_own(error: grpc.aio.AioRpcError) -> bool:
    return error.code() is grpc.StatusCode.INTERNAL and error.details() == _NOT_SENT


def _error_of(ended: grpc.aio.Call) -> grpc.aio.AioRpcError:
    """The call's current error, which gRPC may replace a moment later."""
    return grpc.aio.AioRpcError(
        completed(ended.code()),
        completed(ended.initial_metadata()),
        completed(ended.trailing_metadata()),
        details=completed(ended.details()),
    )
