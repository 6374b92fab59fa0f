"""Calls with one response, retried where that may help."""
# `timeout` is the call's deadline, which travels to the server; asyncio.timeout would not.
# ruff: noqa: ASYNC109

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from turret.clients.calls.aio import pause, waiting
from turret.clients.calls.settings import CallSettings
from turret.clients.errors import AnswerCutError, TurretRpcError, UnavailableError
from turret.clients.messages.results import Completion
from turret.v1 import inference_pb2


async def call_async(
    method: Callable[..., Awaitable[Any]],
    make_request: Callable[[], object],
    settings: CallSettings,
    timeout: float | None,
    *,
    repeatable: bool = True,
) -> Any:
    """Call a stub's method.

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
            with waiting(settings):
                answer = await method(
                    make_request(), timeout=retries.timeout(), metadata=settings.metadata
                )
            cut = _cut(answer)
            if cut is None:
                return answer
            failure: TurretRpcError = cut
        except grpc.RpcError as error:
            failure = settings.failure(error, seconds)
        delay = retries.delay_after(failure)
        if delay is None:
            raise _last_word(failure, cut)
        await pause(settings, delay)


def _cut(answer: object) -> AnswerCutError | None:
    """The error for an answer that its server ended early; None for any other.

    A caller that gives up gets no answer at all, so that this is never its own doing.
    """
    if not isinstance(answer, inference_pb2.GenerateResponse):
        return None
    if answer.finish_reason != inference_pb2.GenerateResponse.CANCELLED:
        return None
    return AnswerCutError.of(Completion.from_proto(answer))


def _last_word(failure: TurretRpcError, cut: AnswerCutError | None) -> TurretRpcError:
    """The error that a call raises: a partial answer takes precedence over unreachable servers."""
    return cut if cut is not None and isinstance(failure, UnavailableError) else failure
