"""The limit of waiting requests, and the share of it that one tenant may have."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from method_oracle import twin
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters.base import ChangedBase
from turret.server.engine.answer import AnswerText
from turret.server.errors import BudgetExceededError, QueueFullError

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
    async with EngineHarness.start(twin("llama").folder, tmp_path) as harness:
        memory = harness.engine.memory
        # Most of its memory is for the log probabilities of its prompt.
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
    async with EngineHarness.start(twin("llama").folder, tmp_path) as harness:
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
