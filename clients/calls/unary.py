"""Calls with one response, tried again where that may help."""
# `timeout` is the call's deadline, which travels to the server; asyncio.timeout would not.
# ruff: noqa: ASYNC109

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio

from turret.clients.calls.settings import CallSettings, closed_under_a_call
from turret.clients.errors import AnswerCutError, TurretRpcError, UnavailableError
from turret.clients.messages.results import Completion
from turret.v1 import inference_pb2


def call(
    method: Callable[..., Any],
    make_request: Callable[[], object],
    settings: CallSettings,
    timeout: float | None,
    *,
    repeatable: bool = True,
) -> Any:
    """Call a synchronous stub's method.

    Args:
        method: Of a stub, with one response.
        make_request: Makes the message, or the iterator of messages, of each try.
        settings: What every call of the client carries.
        timeout: Deadline in seconds of all tries together; None means the client's.
        repeatable: Whether a second execution of the call does no harm.

    Raises:
        AnswerCutError: A server that stops gave half an answer, and no other gave all of it.
        TurretRpcError: The last try failed.
    """
    cut: AnswerCutError | None = None
    seconds = settings.unary_timeout(timeout)
    retries = settings.policy.begin(seconds, repeatable=repeatable)
    while True:
        try:
            answer = method(make_request(), timeout=retries.timeout(), metadata=settings.metadata)
            cut = _cut(answer)
            if cut is None:
                return answer
            failure: TurretRpcError = cut
        except grpc.RpcError as error:
            failure = settings.failure(error, seconds)
        delay = retries.delay_after(failure)
        if delay is None:
            raise _last_word(failure, cut)
        if settings.closed.wait(delay):
            raise closed_under_a_call()


async def call_async(
    method: Callable[..., Awaitable[Any]],
    make_request: Callable[[], object],
    settings: CallSettings,
    timeout: float | None,
    *,
    repeatable: bool = True,
) -> Any:
    """As :func:`call`, of an asyncio stub's method."""
    cut: AnswerCutError | None = None
    seconds = settings.unary_timeout(timeout)
    retries = settings.policy.begin(seconds, repeatable=repeatable)
    while True:
        try:
            with told_when_closed(settings):
                answer = await method(
                    make_request(), timeout=retries.timeout(), metadata=settings.metadata
                )
            cut = _cut(answer)
            if cut is None:
                return answer
            failure: TurretRpcError = cut
        except grpc.aio.AioRpcError as error:
            failure = settings.failure(error, seconds)
        delay = retries.delay_after(failure)
        if delay is None:
            raise _last_word(failure, cut)
        await asyncio.sleep(delay)
        if settings.closed.is_set():
            raise closed_under_a_call()


@contextlib.contextmanager
def told_when_closed(settings: CallSettings) -> Iterator[None]:
    """Raise an error of its own where closing the client cancels what is awaited here.

    gRPC cancels the call, which reads as if the task were; who has cancelled that sees it so.
    """
    try:
        yield
    except asyncio.CancelledError:
        if settings.closed.is_set() and not is_task_cancelled():
            raise closed_under_a_call() from None
        raise


def is_task_cancelled() -> bool:
    """Whether somebody has asked the running task to end, which it has not done yet."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _cut(answer: object) -> AnswerCutError | None:
    """What is wrong with an answer that its server has ended; None of any other.

    A caller that gives up gets no answer at all, so that this is never its own doing.
    """
    if not isinstance(answer, inference_pb2.GenerateResponse):
        return None
    if answer.finish_reason != inference_pb2.GenerateResponse.CANCELLED:
        return None
    return AnswerCutError.of(Completion.from_proto(answer))


def _last_word(failure: TurretRpcError, cut: AnswerCutError | None) -> TurretRpcError:
    """What a call raises: of servers that are not there, rather the half answer of one that was."""
    return cut if cut is not None and isinstance(failure, UnavailableError) else failure
