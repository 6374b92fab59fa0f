"""One call: what it sends, its retries, and its answer, complete or as a stream.

Both clients run these coroutines. Those of the synchronous client never suspend, because the
methods of ``BlockingConnection`` block instead, so ``completed`` runs them without an event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, NoReturn, Self, TypeVar

import grpc
import grpc.aio

from turret.clients.channel import Tls, open_channel
from turret.clients.errors import (
    AnswerCutError,
    CallCancelledError,
    DeadlineExceededError,
    RateLimitedError,
    TurretRpcError,
    UnavailableError,
)
from turret.clients.fields import ArgumentTypeError, ArgumentValueError
from turret.clients.results import Chunk, Completion
from turret.clients.words import say
from turret.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    training_pb2_grpc,
)

_TOKEN_KEY = "authorization"
# Metadata key of calls that run on adapters. With its value, a load balancer can send all requests
# for one mix to the same server.
ROUTING_KEY = "x-turret-mix"
# Thirty years. gRPC counts nanoseconds and treats a deadline beyond its range as passed.
_MOST_SECONDS = 1e9
_FIRST_DELAY_SECONDS = 0.5
_MAX_DELAY_SECONDS = 8.0
# Time limit for resuming an interrupted answer while its server restarts and loads the model, and
# the longest delay between two attempts.
_RESTART_SECONDS = 60.0
_RESTART_DELAY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a call is retried.

    A call is retried if the server rejected it and sent a delay (``RetryInfo``: a full queue, or a
    server that is starting or stopping), or if it reached no server and may be repeated.

    Attributes:
        max_retries: Maximum number of further attempts.
        unreached: Whether calls that reached no server are retried.
    """

    max_retries: int
    unreached: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.max_retries, int) or self.max_retries < 0:
            text = say("TOO_SMALL", least=0, value=self.max_retries)
            raise ArgumentValueError("max_retries", text)


class Retries:
    """The remaining attempts of one call.

    Args:
        policy: The client's policy.
        seconds: The deadline for all attempts together; None means no deadline.
        repeatable: Whether the call may be executed twice.

    Attributes:
        seconds: The deadline for all attempts together; None means no deadline.
    """

    def __init__(
        self, policy: RetryPolicy, seconds: float | None, *, repeatable: bool = True
    ) -> None:
        self._count = self._left = policy.max_retries
        self.seconds = seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._unreached = policy.unreached and repeatable
        self._delay = _FIRST_DELAY_SECONDS
        self._given_up_at: float | None = None

    def timeout(self) -> float | None:
        """The rest of the deadline, in seconds, for the next attempt."""
        if self._deadline is None:
            return None
        return max(self._deadline - time.monotonic(), 0.0)

    def renew(self) -> None:
        """Restore all attempts, because the last one made progress."""
        self._left, self._delay = self._count, _FIRST_DELAY_SECONDS
        self._given_up_at = None

    def delay_after(self, error: TurretRpcError, *, is_broken: bool = False) -> float | None:
        """Seconds until the next attempt; None if the error is final.

        Args:
            error: The error of the last attempt.
            is_broken: Whether a part of the answer has arrived. If so, attempts that reach no
                server are not counted while the server may be restarting.
        """
        if not self._count or not self._may_help(error):
            return None
        end = self._deadline
        if is_broken and isinstance(error, UnavailableError) and not error.is_lost:
            end = self._end_of_restart()
            self._delay = min(self._delay, _RESTART_DELAY_SECONDS)
        elif self._left:
            self._left -= 1
        else:
            return None
        # Add jitter, so that clients rejected together do not retry together.
        delay = self._delay * random.uniform(0.75, 1.0)
        if error.retry_delay is not None:
            delay = max(delay, error.retry_delay)
        if end is not None and time.monotonic() + delay >= end:
            return None
        self._delay = min(2.0 * self._delay, _MAX_DELAY_SECONDS)
        return delay

    def _end_of_restart(self) -> float:
        if self._given_up_at is None:
            self._given_up_at = time.monotonic() + _RESTART_SECONDS
        return min(self._given_up_at, self._deadline or self._given_up_at)

    def _may_help(self, error: TurretRpcError) -> bool:
        if isinstance(error, RateLimitedError):
            return error.retry_delay is not None
        if isinstance(error, UnavailableError):
            return error.is_of_server or self._unreached
        return False


@dataclass(frozen=True, slots=True)
class CallSettings:
    """Settings that every call of a client uses.

    Attributes:
        metadata: Sent with each call; holds the token.
        timeout: Default deadline in seconds of calls that return one response.
        policy: Decides which failed calls are retried.
        closed: Set once the client is closed, even if calls are still running.
    """

    metadata: tuple[tuple[str, str], ...]
    timeout: float | None
    policy: RetryPolicy
    closed: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, token: str | None, timeout: float | None, policy: RetryPolicy) -> CallSettings:
        if not isinstance(token, str | None):
            raise ArgumentTypeError("token", say("NOT_A_STRING", value=type(token).__name__))
        if token and not (token.isascii() and token.isprintable()):
            raise ArgumentValueError("token", say("NOT_ASCII"))
        if token and token.lower().startswith("bearer "):
            raise ArgumentValueError("token", say("INCLUDES_BEARER"))
        metadata = ((_TOKEN_KEY, f"Bearer {token}"),) if token else ()
        return cls(metadata, stream_timeout(timeout), policy)

    def routed(self, mix: Iterable[adapters_pb2.AdapterWeight]) -> CallSettings:
        """The settings of a call that runs on a mix."""
        # Weights are left out, since all mixes of the same adapters need the same memory.
        key = ",".join(sorted(member.name for member in mix))
        # Metadata cannot contain names with other characters. The server reports them as unknown.
        if not (key and key.isascii() and key.isprintable()):
            return self
        return replace(self, metadata=(*self.metadata, (ROUTING_KEY, key)))

    def failure(self, error: grpc.RpcError, seconds: float | None) -> TurretRpcError:
        """The error for a failed call, with details that only the client knows.

        Args:
            error: The error of a synchronous or an asyncio call.
            seconds: The deadline of the call, for all of its attempts together.
        """
        failure = TurretRpcError.from_grpc(error)
        if isinstance(failure, CallCancelledError) and self.closed.is_set():
            return closed_during_call()
        if isinstance(failure, DeadlineExceededError) and seconds:
            failure.metadata["timeout"] = f"{seconds:g}"
        return failure


def closed_during_call() -> CallCancelledError:
    """The error of a call whose client is closed while it runs."""
    return CallCancelledError(grpc.StatusCode.CANCELLED, say("CLOSED_DURING_CALL"))


def stream_timeout(timeout: float | None) -> float | None:
    """The deadline of a stream; None, infinity and values too large for a clock mean none.

    Raises:
        TypeError: The value is not a number.
        ValueError: The number is not positive.
    """
    if timeout is None:
        return None
    # numpy's numbers are Real too, and in Python so is a bool.
    if not isinstance(timeout, Real) or isinstance(timeout, bool):
        raise ArgumentTypeError("timeout", say("NOT_A_NUMBER", value=repr(timeout)))
    if not timeout > 0:
        raise ArgumentValueError("timeout", say("NOT_ABOVE", bound=0, value=timeout))
    return float(timeout) if timeout < _MOST_SECONDS else None


# Time to wait for the last event of a cancelled call, which usually arrives within 1 ms.
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
    """Replaces the stub of a closed client. Its error names the client, unlike that of gRPC."""

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
        self._last_cut = -math.inf
        self.inference = _LoopStub(self.inference, loop, self._note_cut)
        self.adapters = _LoopStub(self.adapters, loop, self._note_cut)
        self.training = _LoopStub(self.training, loop, self._note_cut)

    def _note_cut(self, call: grpc.aio.Call) -> None:
        """Note the time at which a call was cancelled.

        gRPC handles the last event of a cancelled call a little later, through a queue that all
        event loops of the process share. If the loop has ended by then and any channel is still
        alive, the next loop finds the event and prints that the first loop is closed. No call and
        no channel reports that the event has been handled.
        """
        if call.cancelled():
            self._last_cut = time.monotonic()

    async def close(self) -> None:
        """Cancel running calls, and make later ones raise RuntimeError.

        If a call was cancelled just before, this takes up to 50 ms, so that gRPC has finished with
        the call before the event loop ends.
        """
        self._close_stubs()
        for channel in self._channels:
            await channel.close()
        # Wait in this event loop for as long as the last event of a cancelled call may arrive.
        left = self._last_cut + _CUT_SECONDS - time.monotonic()
        if left > 0:
            await asyncio.sleep(left)

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
        ended: Called with each call that has ended.

    Raises:
        RuntimeError: No event loop is running, or a different one is.
    """

    def __init__(
        self, stub: object, loop: asyncio.AbstractEventLoop, ended: Callable[[grpc.aio.Call], None]
    ) -> None:
        self._stub = stub
        self._loop = loop
        self._ended = ended

    def __getattr__(self, name: str) -> Any:
        if _running_loop() is not self._loop:
            raise RuntimeError(say("OTHER_EVENT_LOOP"))
        method = getattr(self._stub, name)

        def start(*arguments: Any, **options: Any) -> grpc.aio.Call:
            call = method(*arguments, **options)
            call.add_done_callback(self._ended)
            return call

        return start


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


# `timeout` is the call's deadline, which travels to the server; asyncio.timeout would not.
# ruff: noqa: ASYNC109


_CANCELLED = inference_pb2.GenerateResponse.CANCELLED
AnyConnection = AsyncConnection | BlockingConnection


class StreamClosedError(Exception):
    """The caller closed the stream while waiting for it."""


@contextlib.contextmanager
def waiting(settings: CallSettings, closed: threading.Event | None = None) -> Iterator[None]:
    """Raise a specific error if the client or the stream is closed while a call waits.

    gRPC then cancels the call, which looks to asyncio as if the task were cancelled.

    Args:
        settings: The client's settings.
        closed: Set if the stream is closed.
    """
    try:
        yield
    except (grpc.RpcError, asyncio.CancelledError) as error:
        is_cancelled = isinstance(error, asyncio.CancelledError)
        task = asyncio.current_task() if is_cancelled else None
        if task is not None and task.cancelling() > 0:
            # The task itself was cancelled.
            raise
        if closed is not None and closed.is_set():
            raise StreamClosedError from None
        if is_cancelled and settings.closed.is_set():
            raise closed_during_call() from None
        raise


async def call(
    connection: AnyConnection,
    method: Callable[..., Any],
    make_request: Callable[[], object],
    settings: CallSettings,
    timeout: float | None,
    *,
    repeatable: bool = True,
) -> Any:
    """Call a stub's method.

    Args:
        connection: The client's connection.
        method: A stub's method that has one response.
        make_request: Creates the message, or the iterator of messages, for each attempt.
        settings: Settings that every call of the client uses.
        timeout: Deadline in seconds for all attempts together; None means the client's.
        repeatable: Whether a second execution of the call does no harm.

    Raises:
        AnswerCutError: A stopping server cut the answer, and no other server completed it.
        TurretRpcError: The last attempt failed.
    """
    cut: AnswerCutError | None = None
    seconds = stream_timeout(settings.timeout if timeout is None else timeout)
    retries = Retries(settings.policy, seconds, repeatable=repeatable)
    while True:
        try:
            with waiting(settings):
                begun = method(
                    make_request(), timeout=retries.timeout(), metadata=settings.metadata
                )
                answer = await connection.answer(begun)
            # A caller that cancels gets no answer at all, so here the server ended the answer
            # early.
            if getattr(answer, "finish_reason", None) != _CANCELLED:
                return answer
            failure = cut = AnswerCutError.of(Completion.from_proto(answer))
        except grpc.RpcError as error:
            failure = settings.failure(error, seconds)
        delay = retries.delay_after(failure)
        if delay is None:
            # A partial answer takes precedence over unreachable servers.
            raise cut if cut is not None and isinstance(failure, UnavailableError) else failure
        if await connection.wait(settings.closed, delay):
            raise closed_during_call()


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
        connection: AnyConnection,
        progress: AnswerProgress,
        settings: CallSettings,
    ) -> None:
        """Send the request.

        Args:
            connection: The client's connection.
            progress: The part of the answer that has arrived.
            settings: The settings of the call.
        """
        self._connection = connection
        self._progress = progress
        self._settings = settings
        self._closed = threading.Event()
        self._cut_by: TurretRpcError | None = None
        self._send()

    def _send(self) -> None:
        self._call = self._connection.inference.GenerateStream(
            self._progress.request,
            timeout=self._progress.retries.timeout(),
            metadata=self._settings.metadata,
        )
        self._responses = self._connection.responses(self._call)

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
                with waiting(self._settings, self._closed):
                    chunk = await anext(self._responses)
                return self._progress.take(chunk)
            except StreamClosedError:
                raise StopAsyncIteration from None
            except StopAsyncIteration:
                if self._progress.is_whole:
                    raise
                # A proxy may end a stream without the server's status.
                failure = AnswerCutError.of(None)
            except grpc.RpcError as error:
                failure = self._settings.failure(error, self._progress.retries.seconds)
            except UnavailableError as error:
                failure = error
            if self._progress.is_whole and isinstance(failure, UnavailableError):
                raise StopAsyncIteration
            delay = self._progress.delay_after(failure)
            if delay is None:
                await self.aclose()
                if self._progress.cut is None:
                    raise failure
                # Do not mention that no other server was reachable.
                is_gone = isinstance(failure, UnavailableError)
                self._cut_by = AnswerCutError.of(None) if is_gone else failure
                return self._progress.cut
            await self._restart(delay)

    async def _restart(self, delay: float) -> None:
        if not await self._connection.wait(self._closed, delay):
            if self._settings.closed.is_set():
                raise closed_during_call()
            self._send()
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


class AnswerProgress:
    """The part of a streamed answer that has arrived.

    Args:
        request: The request, of which this class changes a copy.
        retries: The remaining attempts. Each new token restores all of them.
        resume: Whether an interrupted answer continues where it stopped. The server continues as if
            nothing had happened, so no text is repeated or missing. With a seed or greedy decoding,
            the text is also the same as without the interruption.

    Attributes:
        request: The request to send next, with the answer so far.
        retries: The remaining attempts.
        is_whole: Whether the last part has arrived, so that only the call's status is missing.
        cut: The last part of an answer that a stopping server ended early, unless it was continued.
    """

    def __init__(
        self, request: inference_pb2.GenerateRequest, retries: Retries, *, resume: bool
    ) -> None:
        self.request = inference_pb2.GenerateRequest()
        self.request.CopyFrom(request)
        self.retries = retries
        self._resume = resume
        self._wants_token_ids = request.options.token_ids
        self._has_begun = False
        self.is_whole = False
        self.cut: Chunk | None = None
        if resume:
            self.request.options.token_ids = True

    def take(self, proto: inference_pb2.GenerateChunk) -> Chunk:
        """Record a part of the answer; returns it in the form that the caller requested.

        Raises:
            AnswerCutError: The server is stopping; another server may continue the answer.
        """
        chunk = Chunk.from_proto(proto)
        if not self._wants_token_ids:
            chunk = replace(chunk, token_ids=())
        if proto.finish_reason == _CANCELLED:
            self.cut = chunk
            raise AnswerCutError.of(None)
        self._note(proto)
        self.is_whole = chunk.finish_reason is not None
        return chunk

    def delay_after(self, failure: TurretRpcError) -> float | None:
        """Seconds until the request is sent again; None if the failure is final."""
        if self._has_begun and not self._resume:
            return None
        return self.retries.delay_after(failure, is_broken=self._has_begun)

    def _note(self, proto: inference_pb2.GenerateChunk) -> None:
        request = self.request
        self.cut = None
        is_prompt = request.options.echo and not self._has_begun
        self._has_begun = True
        if is_prompt:
            # The prompt has arrived; do not echo it again.
            request.options.echo = False
            return
        # Pin the generations, so that only the same weights continue the answer.
        for member, use in zip(request.adapters, proto.adapters_used, strict=False):
            member.name, member.generation = use.name, use.generation
        if proto.text and not (proto.token_ids or request.answer_so_far):
            # A server that reports no token ids cannot resume the answer either.
            self._resume = False
        if self._resume and proto.token_ids:
            request.answer_so_far.extend(proto.token_ids)
            self.retries.renew()
