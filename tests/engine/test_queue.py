"""The limit of waiting requests, and the share of it that one tenant may have."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection
from pathlib import Path

import pytest
from method_oracle import twin
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters.base import ChangedBase
from turret.server.engine.answer import AnswerText
from turret.server.errors import BudgetExceededError, QueueFullError

PROMPT = [1] * 10


async def test_a_tenant_cannot_take_the_whole_memory_of_the_queue(tmp_path: Path) -> None:
    go_on = threading.Event()

    def pause() -> ChangedBase:
        assert go_on.wait(30)
        return ChangedBase(2, frozenset())

    async with EngineHarness.start(twin("llama").folder, tmp_path) as harness:
        engine = harness.engine
        # Most of its memory is for the log probabilities of its prompt.
        size = make_request(PROMPT, score=True).num_bytes
        engine.memory.most = 8 * size
        engine.change_base(pause)
        streams = []

        async def ask(tenant: bytes) -> None:
            streams.append(await engine.submit(make_request(PROMPT, score=True, tenant=tenant)))

        async def refused(tenant: bytes) -> str:
            with pytest.raises(QueueFullError) as caught:
                await ask(tenant)
            return caught.value.args[0].reason

        for _ in range(4):
            await ask(b"greedy")
        assert await refused(b"greedy") == "QUEUE_MEMORY_SHARE_FULL"
        for tenant in (b"other", b"another", b"", b""):
            await ask(tenant)
        assert await refused(b"other") == await refused(b"") == "QUEUE_MEMORY_FULL"
        # A request that would take more than the share of its tenant is never accepted.
        engine.memory.most = size
        with pytest.raises(BudgetExceededError):
            await ask(b"new")
        engine.memory.most = 8 * size
        go_on.set()
        for stream in streams:
            assert [output.finish async for output in stream][-1] is not None
        assert engine.memory.held == 0


async def test_a_tenant_cannot_take_the_whole_queue(tmp_path: Path) -> None:
    go_on = threading.Event()

    def pause() -> ChangedBase:
        assert go_on.wait(30)
        return ChangedBase(2, frozenset())

    async with EngineHarness.start(twin("llama").folder, tmp_path) as harness:
        engine = harness.engine
        engine._max_queued_requests = 8
        engine.change_base(pause)

        async def ask(tenant: bytes) -> None:
            streams.append(await engine.submit(make_request([1], max_tokens=1, tenant=tenant)))

        async def refused(tenant: bytes) -> str:
            with pytest.raises(QueueFullError) as caught:
                await ask(tenant)
            return caught.value.args[0].reason

        streams = []
        for _ in range(6):
            await ask(b"greedy")
        assert await refused(b"greedy") == "QUEUE_SHARE_FULL"
        await ask(b"other")
        # Requests without a token have no tenant.
        await ask(b"")
        for tenant in (b"", b"other", b"greedy"):
            assert await refused(tenant) == "QUEUE_FULL"
        go_on.set()
        for stream in streams:
            assert [output.finish async for output in stream][-1] is not None
        await ask(b"greedy")
        assert [output.finish async for output in streams[-1]][-1] is not None


async def test_partial_answers_are_replayed_for_tenants_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay, number = AnswerText.replay, 60

    def slow(text: AnswerText, tokens: Collection[int]) -> None:
        time.sleep(0.02)
        replay(text, tokens)

    monkeypatch.setattr(AnswerText, "replay", slow)
    async with EngineHarness.start(twin("llama").folder, tmp_path) as harness:

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
