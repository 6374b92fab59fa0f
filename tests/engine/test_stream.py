"""The memory that a stream holds is counted, bounded and released."""

from __future__ import annotations

import asyncio
import weakref
from threading import Event

import pytest
from said import says

from turret.server.engine.answer import MAX_UNREAD_BYTES, Stream
from turret.server.engine.scheduling.request import (
    Finish,
    FinishReason,
    Output,
    Timing,
    TokenLogprob,
    Usage,
)
from turret.server.errors import BudgetExceededError, UnavailableError

REQUEST_BYTES = 1000
FINISH = Finish(
    reason=FinishReason.STOP,
    usage=Usage(prompt_tokens=1, cached_tokens=0, completion_tokens=1),
    adapters_used=(),
    timing=Timing(queue_seconds=0.0, time_to_first_token_seconds=0.0, total_seconds=0.0),
)


class Held:
    """A stream, and its count of held memory."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.num_cancels = 0
        self.may_grow = True
        self.stream = Stream(self._cancelled, self._hold, REQUEST_BYTES)

    def _cancelled(self) -> None:
        self.num_cancels += 1

    def _hold(self, num_bytes: int) -> bool:
        self.num_bytes += num_bytes
        return self.may_grow


async def test_unread_output_is_counted_until_the_stream_ends() -> None:
    held = Held()
    assert held.num_bytes == REQUEST_BYTES
    output = Output(text="x" * 500)
    held.stream.deliver(output)
    held.stream.deliver(Output(finish=FINISH))
    assert held.num_bytes > REQUEST_BYTES + 500
    assert await anext(held.stream) is output
    assert REQUEST_BYTES < held.num_bytes < REQUEST_BYTES + 500
    await anext(held.stream)
    assert held.num_bytes == 0
    held.stream.cancel()
    assert held.num_bytes == 0


async def test_a_stream_that_has_ended_keeps_no_request_alive() -> None:
    """A call with 2,048 inputs keeps its streams until its end, but must not keep their tokens."""
    ends = (Output(finish=FINISH), UnavailableError("gone"))
    for end in (*ends, None):
        request = Event()
        stream = Stream(request.set)
        left = weakref.ref(request)
        if end is None:
            stream.cancel()
            assert request.is_set()
        else:
            stream.deliver(end)
            await asyncio.gather(anext(stream), return_exceptions=True)
            assert not request.is_set()
        del request
        assert left() is None
        stream.cancel()


async def test_an_error_or_a_cancellation_releases_all_output() -> None:
    failed, cancelled = Held(), Held()
    failed.stream.deliver(UnavailableError("gone"))
    with pytest.raises(UnavailableError):
        await anext(failed.stream)
    assert failed.num_bytes == 0
    cancelled.stream.deliver(Output(text="x"))
    cancelled.stream.cancel()
    assert cancelled.num_bytes == 0
    # The engine still reports the end.
    cancelled.stream.deliver(Output(finish=FINISH))
    assert [output.finish async for output in cancelled.stream] == [None, FINISH]
    assert cancelled.num_bytes == 0


async def test_an_answer_that_nobody_reads_ends() -> None:
    held = Held()
    part = Output(text="x" * (MAX_UNREAD_BYTES // 4))
    for _ in range(100):
        held.stream.deliver(part)
    assert held.num_cancels == 1
    assert held.num_bytes == 0
    with pytest.raises(BudgetExceededError, check=says("ANSWER_UNREAD")):
        await anext(held.stream)
    with pytest.raises(StopAsyncIteration):
        await anext(held.stream)


async def test_an_unread_answer_ends_early_if_its_tenant_holds_too_much() -> None:
    held, part = Held(), Output(text="x" * 1000)
    for _ in range(100):
        held.stream.deliver(part)
    assert held.num_cancels == 0
    # A client that reads as fast as it can has only the last parts left.
    held.may_grow = False
    for _ in range(90):
        await anext(held.stream)
    for _ in range(30):
        held.stream.deliver(part)
    assert held.num_cancels == 0
    for _ in range(30):
        held.stream.deliver(part)
    assert held.num_cancels == 1
    assert held.num_bytes == 0


async def test_one_large_part_does_not_count_as_a_backlog() -> None:
    """A long prompt's logprobs arrive in one piece, and the first token during their conversion."""
    held = Held()
    logprob = TokenLogprob(token_id=1, text="a", logprob=-1.0)
    large = Output(prompt_logprobs=(logprob,) * 100_000)
    assert large.num_bytes > MAX_UNREAD_BYTES
    held.stream.deliver(large)
    held.stream.deliver(Output(text="x"))
    assert await anext(held.stream) is large
    assert held.num_cancels == 0
