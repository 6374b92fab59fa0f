"""The course of a call: a response with its retries, or an answer that grows and is resumed."""
# `timeout` is the call's deadline, which travels to the server; asyncio.timeout would not.
# ruff: noqa: ASYNC109

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any, Self

import grpc

from turret.clients.calls.connections import AsyncConnection, BlockingConnection
from turret.clients.calls.settings import (
    CallSettings,
    Retries,
    closed_during_call,
    stream_timeout,
)
from turret.clients.errors import AnswerCutError, TurretRpcError, UnavailableError
from turret.clients.messages.results import Chunk, Completion
from turret.v1 import inference_pb2

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
                self._cut_by = self._progress.end_of_cut(failure)
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
            nothing had happened, so no text is repeated or missing. With a seed or greedily, the
            text is also the same.

    Attributes:
        request: The request to send next, with the answer so far.
        retries: The remaining attempts.
        is_whole: The last part has arrived; only the call's status is missing.
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

    def end_of_cut(self, failure: TurretRpcError) -> TurretRpcError:
        """The error to raise after the last part of an answer that a server ended.

        The error does not mention that no other server was reachable.
        """
        is_gone = isinstance(failure, UnavailableError)
        return AnswerCutError.of(None) if is_gone else failure

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
