"""Requests for a cold adapter on a real engine: it is read once, and other requests do not wait."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from builders.bases.tiny_models import save_tiny_model
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from builders.registries import Gate, until
from said import says
from servers.engine_harness import EngineHarness, make_request

from turret.server.errors import BudgetExceededError

PROMPT = tuple(range(60, 84))
NUM_REQUESTS = 100


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[EngineHarness]:
    model = save_tiny_model("qwen3", tmp_path / "model")
    for seed, name in enumerate(("warm", "cold")):
        spec = AdapterSpec(name, rank=4, strength=1.0)
        write_adapter(tmp_path / "adapters", arch_of(model), spec, seed=seed)
    async with EngineHarness.start(
        model, tmp_path / "adapters", adapters=("warm", "cold")
    ) as harness:
        yield harness


def make_cold(engine: EngineHarness) -> Gate:
    """Evicts ``cold``, which is read again once the gate is opened."""
    registry = engine.registry
    registry._leases._memory.leave(registry._table.find("cold").current)
    return Gate(registry)


async def test_a_hundred_requests_read_a_cold_adapter_once(engine: EngineHarness) -> None:
    expected = await engine.run(make_request(PROMPT, "cold"))
    gate = make_cold(engine)
    asked = [
        asyncio.ensure_future(engine.run(make_request(PROMPT, "cold"))) for _ in range(NUM_REQUESTS)
    ]
    await asyncio.to_thread(gate.entered.acquire)
    await asyncio.to_thread(until, lambda: engine.registry.get("cold").in_flight == NUM_REQUESTS)
    gate.open()
    answers = await asyncio.gather(*asked)
    assert gate.reads == ["cold"]
    assert {answer.bits for answer in answers} == {expected.bits}
    uses = [answer.finish.adapters_used[0] for answer in answers]
    assert all(use.cold_start and use.load_ms > 0 for use in uses)
    assert not (await engine.run(make_request(PROMPT, "cold"))).finish.adapters_used[0].cold_start
    assert engine.registry.get("cold").in_flight == 0


async def test_others_run_to_their_end_while_an_adapter_is_read(engine: EngineHarness) -> None:
    gate = make_cold(engine)
    waiting = asyncio.ensure_future(engine.run(make_request(PROMPT, "cold")))
    mixed = asyncio.ensure_future(engine.run(make_request(PROMPT, "warm", "cold")))
    await asyncio.to_thread(gate.entered.acquire)
    # The read lasts as long as these requests, not the reverse.
    others = [make_request(PROMPT, "warm"), make_request(PROMPT), make_request(PROMPT, "warm")]
    for answer in await engine.run_all(others * 4):
        assert answer.finish.usage.completion_tokens == 8
    assert not waiting.done()
    assert not mixed.done()
    gate.open()
    answers = await asyncio.gather(waiting, mixed)
    assert gate.reads == ["cold"]
    assert all(len(answer.token_ids) == 8 for answer in answers)


async def test_a_request_cancelled_while_it_waits_releases_its_adapter(
    engine: EngineHarness,
) -> None:
    gate = make_cold(engine)
    stream = await engine.engine.submit(make_request(PROMPT, "cold"))
    await asyncio.to_thread(gate.entered.acquire)
    stream.cancel()
    outputs = [output async for output in stream]
    assert outputs[-1].finish is not None
    assert engine.registry.get("cold").in_flight == 0
    unload = asyncio.to_thread(engine.registry.unload, "cold", "DRAIN", 0.0)
    await unload
    gate.open()
    await engine.run(make_request(PROMPT, "warm"))


async def test_each_request_gets_the_generation_it_named_despite_a_replacement(
    engine: EngineHarness,
) -> None:
    by_name = {name: await engine.run(make_request(PROMPT, name)) for name in ("warm", "cold")}
    gate = make_cold(engine)
    old = asyncio.ensure_future(engine.run(make_request(PROMPT, "cold")))
    await asyncio.to_thread(gate.entered.acquire)
    await asyncio.to_thread(engine.registry.replace, "cold", "warm")
    new = await engine.run(make_request(PROMPT, "cold"))
    assert new.bits == by_name["warm"].bits
    assert not old.done()
    gate.open()
    answer = await old
    assert answer.bits == by_name["cold"].bits
    assert answer.finish.adapters_used[0].generation == 1


async def test_the_device_budget_holds_and_what_exceeds_it_alone_is_refused(
    tmp_path: Path,
) -> None:
    model = save_tiny_model("qwen3", tmp_path / "model")
    names = [f"a{number}" for number in range(6)]
    for seed, name in enumerate(names):
        spec = AdapterSpec(name, rank=8, strength=1.0)
        write_adapter(tmp_path / "adapters", arch_of(model), spec, seed=seed)
    async with EngineHarness.start(model, tmp_path / "adapters", adapters=names) as harness:
        await harness.run(make_request(PROMPT, names[0]))
        one = harness.registry.get(names[0]).bytes_device
        asked = [make_request(PROMPT, *mix) for mix in itertools.combinations(names, 2)]
        expected = [await harness.run(request) for request in asked]
    seen = []
    async with EngineHarness.start(
        model, tmp_path / "adapters", adapters=names, adapter_device_bytes=2 * one
    ) as harness:
        runner: Any = harness.engine._loop._runner
        pack = runner._store

        def look(_count: int) -> None:
            seen.append(pack.adapter_bytes)

        answers = await asyncio.gather(*(harness.run(r, on_token=look) for r in asked))
        assert [answer.bits for answer in answers] == [answer.bits for answer in expected]
        assert max(seen) == 2 * one
        with pytest.raises(BudgetExceededError, check=says("MIX_TOO_LARGE")):
            await harness.run(make_request(PROMPT, *names[:3]))
        assert harness.registry.get(names[0]).in_flight == 0
