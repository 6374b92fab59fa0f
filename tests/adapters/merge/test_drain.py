"""Merges while requests run: which requests finish first, wait or fail."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from builders.mixes.merges import PROMPT, merge, save_adapters, score, start
from builders.registries import Gate, until
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters.merger import MergeState
from turret.server.basics.work import Cancellation
from turret.server.errors import AdapterMergedError, UnavailableError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
async def server(root: Path) -> AsyncIterator[EngineHarness]:
    async with start(root) as started:
        yield started


class Stream:
    """A request whose answer is read in the background; ``begun`` is set at its first token."""

    def __init__(self, server: EngineHarness, *adapters: str, tokens: int = 40) -> None:
        self.begun = asyncio.Event()
        request = make_request(PROMPT, *adapters, max_tokens=tokens)
        self.answer = asyncio.ensure_future(
            server.run(request, on_token=lambda _: self.begun.set())
        )


class Brake:
    """Holds or slows the engine's steps.

    Otherwise, a request could end before the merged weights are computed.
    """

    def __init__(self, server: EngineHarness) -> None:
        self.seconds = 0.0
        self._open, self._posted = threading.Event(), threading.Event()
        self._open.set()
        runner = server.engine._loop._runner
        self._run, self._change_base = runner.run, server.merger._change_base
        runner.run, server.merger._change_base = self._slowly, self._noted
        self.hold, self.release = self._open.clear, self._open.set

    async def until_change(self) -> None:
        """Wait until a merge has requested its change of the base."""
        assert await asyncio.to_thread(self._posted.wait, 20)

    def _slowly(self, step: Any, meanwhile: Callable[[], None] = lambda: None) -> Any:
        assert self._open.wait(20)
        time.sleep(self.seconds)
        return self._run(step, meanwhile)

    def _noted(self, change: Any) -> Any:
        outcome = self._change_base(change)
        self._posted.set()
        return outcome


async def test_running_requests_finish_first_and_others_wait(server: EngineHarness) -> None:
    brake = Brake(server)
    expected = [
        (await server.run(make_request(PROMPT, *mix, max_tokens=40))).bits
        for mix in ((), ("dora",), ("ia3", "lora"))
    ]
    running = [Stream(server, *mix) for mix in ((), ("dora",), ("ia3", "lora"))]
    for stream in running:
        await stream.begun.wait()
    brake.hold()
    merging = asyncio.ensure_future(merge(server, "other"))
    await brake.until_change()
    late = [Stream(server, *mix, tokens=4) for mix in ((), ("dora",), ("prefix_tuning",))]
    await asyncio.to_thread(until, lambda: server.engine._loop.num_waiting == len(late))
    gate = Gate(server.registry)
    brake.release()
    state = await merging
    assert [stream.answer.done() for stream in running] == [True] * 3
    assert [(await stream.answer).bits for stream in running] == expected
    assert state.base_generation == 2
    # DoRA's operators are computed again; a request that waits for them does not delay the others.
    await asyncio.gather(late[0].answer, late[2].answer)
    assert gate.reads == ["dora"]
    assert not late[1].answer.done()
    gate.open()
    assert (await late[1].answer).finish.adapters_used[0].cold_start
    again = [
        (await server.run(make_request(PROMPT, *mix, max_tokens=4))).bits
        for mix in ((), ("dora",), ("prefix_tuning",))
    ]
    assert [(await stream.answer).bits for stream in late] == again
    assert again[0][0] != expected[0][0][:4]


async def test_a_request_that_waits_for_the_merge_of_its_own_adapter_is_rejected(
    server: EngineHarness,
) -> None:
    brake = Brake(server)
    running = [Stream(server, *mix) for mix in ((), ("lora",), ("ia3", "lora"))]
    for stream in running:
        await stream.begun.wait()
    brake.hold()
    merging = asyncio.ensure_future(merge(server, "lora"))
    await brake.until_change()
    late = [Stream(server, *mix, tokens=4) for mix in (("lora",), ("ia3",), ("ia3", "lora"))]
    await asyncio.to_thread(until, lambda: server.engine._loop.num_waiting == len(late))
    brake.release()
    await merging
    for stream in (*running, late[1]):
        await stream.answer
    for stream in (late[0], late[2]):
        with pytest.raises(AdapterMergedError):
            await stream.answer


async def test_a_merge_cancelled_while_it_drains_changes_nothing(server: EngineHarness) -> None:
    before = await score(server)
    brake = Brake(server)
    brake.seconds = 0.005
    running = Stream(server, tokens=150)
    await running.begun.wait()
    brake.hold()
    cancellation = Cancellation()
    merging = asyncio.ensure_future(merge(server, "other", cancellation=cancellation))
    await brake.until_change()
    brake.release()
    late = asyncio.ensure_future(score(server))
    await asyncio.sleep(0.05)
    assert not late.done()
    cancellation.set(UnavailableError("enough"))
    with pytest.raises(UnavailableError, match="enough"):
        await merging
    # The late request runs at once, alongside the running one.
    assert (await late).bits == before.bits
    assert not running.answer.done()
    assert server.merger.state == MergeState(1)
    brake.seconds = 0.0
    await running.answer
    await merge(server, "other")


async def test_a_shutdown_during_the_drain_ends_the_merge(root: Path) -> None:
    async with start(root) as server:
        brake = Brake(server)
        brake.seconds = 0.005
        running = Stream(server, tokens=150)
        await running.begun.wait()
        brake.hold()
        merging = asyncio.ensure_future(merge(server, "other"))
        await brake.until_change()
        brake.release()
        # The stop interrupts the merge and the request, because it does not wait.
        server.engine._loop.post(server.engine._loop.stop)
        with pytest.raises(UnavailableError):
            await merging
        assert (await running.answer).finish.reason.value == "cancelled"
        await server.engine.drain(0.0)
        with pytest.raises(UnavailableError):
            await merge(server, "other")
