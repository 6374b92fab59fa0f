"""Limits of waiting requests and of unread answers, and one tenant's share of them."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Collection
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from method_oracle import serve
from said import says
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters.base import ChangedBase
from turret.server.engine.answer import MAX_UNREAD_BYTES, AnswerMemory, AnswerText, Stream
from turret.server.engine.scheduling.request import (
    Finish,
    FinishReason,
    Output,
    Timing,
    TokenLogprob,
    Usage,
)
from turret.server.errors import BudgetExceededError, QueueFullError, UnavailableError

PROMPT = [1] * 10


class Asked:
    """Requests that wait while the base is changed."""

    def __init__(self, harness: EngineHarness, **options: Any) -> None:
        self.streams: list[Any] = []
        self._engine, self._options = harness.engine, options
        self._go_on = threading.Event()
        self._engine.change_base(self._pause)

    def _pause(self) -> ChangedBase:
        assert self._go_on.wait(30)
        return ChangedBase(2, frozenset())

    async def ask(self, tenant: bytes) -> None:
        request = make_request(PROMPT, tenant=tenant, **self._options)
        self.streams.append(await self._engine.submit(request))

    async def refused(self, tenant: bytes) -> str:
        with pytest.raises(QueueFullError) as caught:
            await self.ask(tenant)
        return caught.value.args[0].reason

    async def answers(self) -> None:
        """Let all requests run to their ends."""
        self._go_on.set()
        for stream in self.streams:
            assert [output.finish async for output in stream][-1] is not None
        self.streams.clear()


async def test_a_tenant_cannot_take_the_whole_memory_of_the_queue(tmp_path: Path) -> None:
    async with serve("llama", tmp_path) as harness:
        memory = harness.engine.memory
        # Most of a scored request's memory is for the log probabilities of its prompt.
        size = make_request(PROMPT, score=True).num_bytes
        memory.most = 8 * size
        asked = Asked(harness, score=True)
        for _ in range(4):
            await asked.ask(b"greedy")
        assert await asked.refused(b"greedy") == "QUEUE_MEMORY_SHARE_FULL"
        for tenant in (b"other", b"another", b"", b""):
            await asked.ask(tenant)
        assert await asked.refused(b"other") == await asked.refused(b"") == "QUEUE_MEMORY_FULL"
        # A request that would take more than the share of its tenant is never accepted.
        memory.most = size
        with pytest.raises(BudgetExceededError):
            await asked.ask(b"new")
        memory.most = 8 * size
        await asked.answers()
        assert memory.held == 0


async def test_a_tenant_cannot_take_the_whole_queue(tmp_path: Path) -> None:
    async with serve("llama", tmp_path) as harness:
        harness.engine._max_queued_requests = 8
        asked = Asked(harness, max_tokens=1)
        for _ in range(6):
            await asked.ask(b"greedy")
        assert await asked.refused(b"greedy") == "QUEUE_SHARE_FULL"
        await asked.ask(b"other")
        # Requests without a token have no tenant.
        await asked.ask(b"")
        for tenant in (b"", b"other", b"greedy"):
            assert await asked.refused(tenant) == "QUEUE_FULL"
        await asked.answers()
        await asked.ask(b"greedy")
        await asked.answers()


async def test_partial_answers_are_replayed_for_tenants_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay, number = AnswerText.replay, 60

    def slow(text: AnswerText, tokens: Collection[int]) -> None:
        time.sleep(0.02)
        replay(text, tokens)

    monkeypatch.setattr(AnswerText, "replay", slow)
    async with serve("llama", tmp_path) as harness:

        async def ask(tenant: bytes) -> None:
            so_far = (5,) * 150
            request = make_request([1], max_tokens=151, tenant=tenant, answer_so_far=so_far)
            stream = await harness.engine.submit(request)
            assert [output.finish async for output in stream][-1] is not None

        of_one = [asyncio.create_task(ask(b"one")) for _ in range(number)]
        await asyncio.wait(of_one, return_when=asyncio.FIRST_COMPLETED)
        await ask(b"other")
        assert sum(task.done() for task in of_one) < number / 2
        await asyncio.gather(*of_one)


# The memory that a stream holds is counted, bounded and released.


REQUEST_BYTES = 1000
FINISH = Finish(
    reason=FinishReason.STOP,
    usage=Usage(prompt_tokens=1, cached_tokens=0, completion_tokens=1),
    adapters_used=(),
    timing=Timing(queue_seconds=0.0, time_to_first_token_seconds=0.0, total_seconds=0.0),
)


class Held(AnswerMemory):
    """A stream, and its count of held memory."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.num_cancels = 0
        self.may_grow = True
        self.stream = Stream(self._cancelled, self, num_bytes=REQUEST_BYTES)

    def _cancelled(self) -> None:
        self.num_cancels += 1

    def hold(self, num_bytes: int, tenant: bytes) -> bool:
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
        stream = Stream(request.set, AnswerMemory(1 << 30))
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
