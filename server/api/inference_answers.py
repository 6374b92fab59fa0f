"""Conversion of inference results from domain to proto."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

from turret.server.api.call import Call
from turret.server.api.gate import Backend
from turret.server.api.violations import message_of
from turret.server.basics.turns import FairPool
from turret.server.engine.scheduling.request import (
    AdapterUse,
    Finish,
    FinishReason,
    Output,
    Request,
    Timing,
    TokenLogprob,
)
from turret.server.errors import BudgetExceededError, DeadlineExceededError
from turret.server.words import say
from turret.v1 import inference_pb2

# The engine's outputs for a request, counted for its call.


async def outputs_of(
    backend: Backend, request: Request, call: Call, *, is_whole: bool = False
) -> AsyncGenerator[Output, None]:
    """Run a request on behalf of a call; however the call ends, the engine drops the request.

    Args:
        backend: The backend that runs the request.
        request: The request to run.
        call: The call on whose behalf it runs.
        is_whole: Whether the call collects the answer; see ``keep``.

    Raises:
        BudgetExceededError: See ``keep``.
        DeadlineExceededError: After the last output, if the deadline ended the request.
    """
    call.rename(request.request_id)
    call.runs_on(request.adapters, backend.registry.find)
    trace, submitted = call.trace, 0
    if trace is not None:
        submitted = trace.submitted(request, backend.model_info.name, is_stream=not is_whole)
    stream = await backend.engine.submit(request)
    # Also cancel the stream if the call dies while nobody iterates over it.
    call.at_end(stream.cancel)
    is_counted = False
    try:
        async for output in stream:
            # A call may consist of several requests, so add to its counts.
            if not is_counted:
                call.prompt_tokens += len(request.prompt_token_ids)
                is_counted = True
            call.generated_tokens += len(output.token_ids)
            if trace is not None:
                trace.output(output, submitted)
            if is_whole:
                keep(backend, call, output.answer_bytes)
            yield output
            if output.finish is not None and output.finish.reason is FinishReason.DEADLINE:
                raise DeadlineExceededError(say("DEADLINE_EXCEEDED"))
    finally:
        stream.cancel()


def keep(backend: Backend, call: Call, num_bytes: int) -> None:
    """Count memory of answers that a call collects, until it ends.

    The memory is limited because a client may take any time to read its answer.

    Raises:
        BudgetExceededError: The call has collected more than ``--max-queued-bytes``, or the
            requests and answers of its token take more than ``most_of_answers``.
    """
    if not num_bytes:
        return
    memory, tenant = backend.engine.memory, call.tenant

    def release() -> None:
        memory.hold(-call.kept_bytes, tenant)

    if not call.kept_bytes:
        call.at_end(release)
    call.kept_bytes += num_bytes
    memory.hold(num_bytes, tenant)
    most = memory.most_of_answers(tenant)
    if call.kept_bytes > most:
        text = say("ANSWERS_NEED_MEMORY", bytes=call.kept_bytes, max_queued_bytes=most)
        raise BudgetExceededError(text)
    held = memory.held_of(tenant)
    if held > most:
        text = say("QUEUE_MEMORY_SHARE_FULL", held=held - num_bytes, max_queued_bytes=most)
        raise BudgetExceededError(text)


# Concurrent execution of the parts of one call.

_T = TypeVar("_T")
# Converting more tokens than this takes over a millisecond.
_INLINE_TOKENS = 128
# Large answers share one thread, in turn. Several threads would contend with the event loop and the
# engine for the interpreter's lock.
_converting = FairPool(ThreadPoolExecutor(1, "turret-answer"))


async def converted(tenant: bytes, size: int, convert: Callable[[], _T]) -> _T:
    """The result of ``convert``, which runs off the event loop for more than a few tokens.

    Args:
        tenant: The tenant, at whose turn a large answer is converted.
        size: Number of tokens, including alternatives.
        convert: Converts them.
    """
    if size <= _INLINE_TOKENS:
        return convert()
    return await _converting.run(tenant, convert)


async def together(work: Sequence[Coroutine[Any, Any, _T]], at_a_time: int) -> list[_T]:
    """The results in order, with at most ``at_a_time`` coroutines running.

    If one of them fails, its error is raised once all others are cancelled and have ended.
    """
    results: dict[int, _T] = {}
    waiting = iter(enumerate(work))

    async def run_some() -> None:
        for index, one in waiting:
            results[index] = await one

    # A task for each coroutine would cost the event loop seconds once many clients have gone.
    tasks = [asyncio.ensure_future(run_some()) for _ in range(min(at_a_time, len(work)))]
    try:
        await asyncio.gather(*tasks)
        return [results[index] for index in range(len(work))]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for one in work:
            one.close()


FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.GenerateResponse.STOP,
    FinishReason.LENGTH: inference_pb2.GenerateResponse.LENGTH,
    FinishReason.CANCELLED: inference_pb2.GenerateResponse.CANCELLED,
    FinishReason.DEADLINE: inference_pb2.GenerateResponse.DEADLINE,
}


def token_logprobs(tokens: Iterable[TokenLogprob]) -> list[inference_pb2.TokenLogprob]:
    """The log probabilities as messages; the first prompt token has none."""
    return [
        inference_pb2.TokenLogprob(
            token_id=token.token_id,
            text=token.text,
            logprob=token.logprob,
            top=[
                inference_pb2.TopLogprob(token_id=t.token_id, text=t.text, logprob=t.logprob)
                for t in token.top
            ],
        )
        for token in tokens
    ]


def _duration(seconds: float) -> timedelta:
    return timedelta(seconds=max(seconds, 0.0))


def timing(spans: Timing) -> inference_pb2.Timing:
    return inference_pb2.Timing(
        queue=_duration(spans.queue_seconds),
        ttft=_duration(spans.time_to_first_token_seconds),
        total=_duration(spans.total_seconds),
    )


def adapter_uses(uses: Iterable[AdapterUse]) -> list[inference_pb2.AdapterUse]:
    return [message_of(inference_pb2.AdapterUse, use) for use in uses]


def usage_fields(finish: Finish) -> dict[str, Any]:
    """The fields that every finished answer has, by name."""
    return {
        "usage": message_of(inference_pb2.Usage, finish.usage),
        "adapters_used": adapter_uses(finish.adapters_used),
        "timing": timing(finish.timing),
    }


def finish_fields(finish: Finish, stop_token_ids: frozenset[int]) -> dict[str, Any]:
    """``usage_fields`` and why the answer ended.

    The API reports only a stop that the request itself named, not the model's own end token.
    """
    fields = usage_fields(finish) | {"finish_reason": FINISH_REASONS[finish.reason]}
    if isinstance(finish.stop, str):
        fields["stop_string"] = finish.stop
    elif finish.stop is not None and finish.stop in stop_token_ids:
        fields["stop_token_id"] = finish.stop
    return fields


class JoinedChunks:
    """Joins the chunks of an answer into one message."""

    def __init__(self) -> None:
        self._response = inference_pb2.GenerateResponse()
        self._texts: list[str] = []

    def add(self, chunk: inference_pb2.GenerateChunk) -> None:
        """Add the next chunk, which this modifies."""
        self._texts.append(chunk.text)
        chunk.ClearField("text")
        if not chunk.HasField("usage"):
            # Only the first and the last chunk report the adapters: keep those of the last.
            chunk.ClearField("adapters_used")
        # Both messages have the same field numbers, so merging in the wire format joins the chunks.
        self._response.MergeFromString(chunk.SerializeToString())

    def response(self) -> inference_pb2.GenerateResponse:
        """All chunks as one message."""
        self._response.text = "".join(self._texts)
        return self._response
