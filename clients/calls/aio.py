"""The asyncio client's use of gRPC; ``calls.blocking`` has the same for the blocking client."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from turret.clients.calls.early_status import answer_of
from turret.clients.calls.settings import CallSettings, closed_under_a_call
from turret.clients.channel import ClosedStub, Tls, check_address, open_channel
from turret.clients.words import say
from turret.v1 import adapters_pb2_grpc, inference_pb2_grpc

# Time for the last event of a call that was cut short, which takes about 1 ms.
_CUT_SECONDS = 0.05


class Connection:
    """The channels of one client, and the stubs of both services.

    Args:
        address: Where the server is.
        admin_address: Where the ``Adapters`` service is; None means ``address``.
        tls: How to verify the server; None means a plain connection.

    Raises:
        ArgumentTypeError, ArgumentValueError: As :func:`check_address`.
        RuntimeError: No event loop runs here.
    """

    def __init__(self, address: str, admin_address: str | None, tls: Tls | None) -> None:
        check_address(address, tls)
        if admin_address is not None:
            check_address(admin_address, tls, "admin_address")
        _running_loop()
        addresses = [address] if admin_address is None else [address, admin_address]
        self._channels = [open_channel(grpc.aio, each, tls) for each in addresses]
        self._cuts = _CutCalls()
        inference = inference_pb2_grpc.InferenceStub(self._channels[0])
        adapters = adapters_pb2_grpc.AdaptersStub(self._channels[-1])
        self.inference: Any = _LoopStub(inference, self._cuts)
        self.adapters: Any = _LoopStub(adapters, self._cuts)

    async def close(self) -> None:
        """Cancel running calls, and make later ones raise RuntimeError.

        Where a call was cut short just before, it takes up to 50 ms, so that gRPC is done with it
        before the event loop may end.
        """
        self.inference = self.adapters = ClosedStub()
        for channel in self._channels:
            await channel.close()
        await self._cuts.settle()


class _LoopStub:
    """An asyncio stub bound to its event loop: in another one, gRPC fails with an obscure error.

    Args:
        stub: gRPC's.
        cuts: Told of each call.

    Raises:
        RuntimeError: No event loop runs, or another one than that it was made in.
    """

    def __init__(self, stub: object, cuts: _CutCalls) -> None:
        self._stub = stub
        self._cuts = cuts
        self._loop = _running_loop()

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

    Of a call that is cancelled gRPC drops what is under way, and its last event comes a little
    later, through a queue that all event loops of the process share. After the loop's end, as long
    as any channel lives, the next loop finds it and prints that the first is closed. No call and
    no channel tells when that event is through.
    """

    def __init__(self) -> None:
        self._last = -math.inf

    def note(self, call: grpc.aio.Call) -> None:
        """Record a call that has ended."""
        if call.cancelled():
            self._last = time.monotonic()

    async def settle(self) -> None:
        """Stay in this event loop for as long as such an event may come."""
        left = self._last + _CUT_SECONDS - time.monotonic()
        if left > 0:
            await asyncio.sleep(left)


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(say("NO_EVENT_LOOP")) from None


class Flag:
    """An event that happens once."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    async def wait(self, seconds: float) -> bool:
        """Wait at most this long; returns whether the event has happened."""
        await asyncio.sleep(seconds)
        return self._is_set


class StreamClosedError(Exception):
    """The caller closed the stream while waiting for it."""


class waiting:
    """Raise errors of their own for a client, or a stream, that is closed while it is waited for.

    gRPC cancels the call, which reads as if the task were; who has cancelled that sees it so.

    Args:
        settings: Of the client.
        closed: Set if the stream is closed.
    """

    def __init__(self, settings: CallSettings, closed: Flag | None = None) -> None:
        self._settings = settings
        self._closed = closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if not isinstance(error, asyncio.CancelledError):
            return
        task = asyncio.current_task()
        if task is not None and task.cancelling() > 0:
            # The task itself was cancelled.
            return
        if self._closed is not None and self._closed.is_set():
            raise StreamClosedError from None
        if self._settings.closed.is_set():
            raise closed_under_a_call() from None


async def pause(settings: CallSettings, seconds: float) -> None:
    """Wait before the next attempt.

    Raises:
        CallCancelledError: The client was closed meanwhile.
    """
    await asyncio.sleep(seconds)
    if settings.closed.is_set():
        raise closed_under_a_call()


def told_early(method: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """A method that takes a stream of messages, which the server may reject before it has all."""

    async def send(messages: object, **options: Any) -> Any:
        return await answer_of(method(messages, **options))

    return send
