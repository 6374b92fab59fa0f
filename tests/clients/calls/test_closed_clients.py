"""Clients that are closed while calls run, and calls that their program cancels."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers.fake_turret import FOREVER, FakeAdapters, FakeInference, FakeTurret, fake_turret

from turret.clients.aio import AsyncTurretClient
from turret.clients.client import TurretClient
from turret.clients.errors import CallCancelledError
from turret.clients.words import say

SAID = f"CANCELLED: {say('CLOSED_DURING_CALL')}"
SLOW = "slow"


class Slow(FakeInference):
    """Answers SLOW only after its client has gone."""

    def Generate(self, request, context):
        if request.prompt == SLOW:
            gone = threading.Event()
            context.add_callback(gone.set)
            gone.wait(20)
        return super().Generate(request, context)


@pytest.fixture
def server() -> Iterator[FakeTurret]:
    with fake_turret(Slow) as running:
        yield running


# A call that is answered late, one that is retried, and streams of both kinds.
CALLS: dict[str, Callable[[Any], Any]] = {
    "call": lambda client: client.generate(SLOW),
    "tries": lambda client: client.generate("busy"),
    "stream": lambda client: client.generate_stream(FOREVER),
    "stream tries": lambda client: client.generate_stream("busy"),
}


@pytest.mark.parametrize("ask", CALLS.values(), ids=CALLS)
def test_a_running_call_reports_that_its_client_was_closed(server: FakeTurret, ask):
    client = TurretClient(server.address)
    closes = threading.Timer(0.2, client.close)
    closes.start()
    started = time.monotonic()
    with pytest.raises(CallCancelledError, match=f"^{SAID}"):
        list(ask(client))
    assert time.monotonic() - started < 5
    closes.join()


async def _to_the_end(ask: Any, client: AsyncTurretClient) -> None:
    asked = ask(client)
    if hasattr(asked, "__aiter__"):
        async for _ in asked:
            pass
    else:
        await asked


@pytest.mark.parametrize("ask", CALLS.values(), ids=CALLS)
async def test_a_running_asyncio_call_reports_that_its_client_was_closed(server: FakeTurret, ask):
    client = AsyncTurretClient(server.address)
    task = asyncio.create_task(_to_the_end(ask, client))
    await asyncio.sleep(0.2)
    await client.close()
    with pytest.raises(CallCancelledError, match=f"^{SAID}"):
        await task


@pytest.mark.parametrize("ask", CALLS.values(), ids=CALLS)
async def test_a_task_cancelled_by_its_program_is_cancelled(server: FakeTurret, ask):
    async with AsyncTurretClient(server.address) as client:
        task = asyncio.create_task(_to_the_end(ask, client))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await _to_the_end(ask, client)
    # The client closes and the task is cancelled at the same time.
    client = AsyncTurretClient(server.address)
    task = asyncio.create_task(_to_the_end(ask, client))
    await asyncio.sleep(0.2)
    task.cancel()
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_stream_that_another_task_closes_ends(server: FakeTurret):
    async with AsyncTurretClient(server.address) as client:
        stream = client.generate_stream(FOREVER)
        task = asyncio.create_task(_to_the_end(lambda _: stream, client))
        await asyncio.sleep(0.2)
        await stream.aclose()
        await task


async def test_an_export_reports_that_its_client_was_closed(
    server: FakeTurret, tmp_path: Path, monkeypatch
):
    export = FakeAdapters.ExportAdapter

    def slow(self, request, context):
        gone = threading.Event()
        context.add_callback(gone.set)
        yield next(export(self, request, context))
        gone.wait(20)

    monkeypatch.setattr(FakeAdapters, "ExportAdapter", slow)
    with fake_turret() as other:
        client = AsyncTurretClient(other.address)
        task = asyncio.create_task(client.adapters.export("sql", tmp_path / "a"))
        await asyncio.sleep(0.2)
        await client.close()
        with pytest.raises(CallCancelledError, match=f"^{SAID}"):
            await task
        own = TurretClient(other.address)
        closes = threading.Timer(0.2, own.close)
        closes.start()
        with pytest.raises(CallCancelledError, match=f"^{SAID}"):
            own.adapters.export("sql", tmp_path / "a")
        closes.join()
    assert not (tmp_path / "a").exists()
