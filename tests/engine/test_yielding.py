"""Requests that yield their places get the same bits as alone."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from builders.bases.tiny_models import save_tiny_model
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from servers.engine_harness import EngineHarness, make_request

from turret.server.engine.scheduling.request import SamplingParams

LONG, SHORT = 400, 4


async def test_a_preempted_request_gets_the_same_bits(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    write_adapter(tmp_path / "adapters", arch_of(model), AdapterSpec("polite", rank=4), 0)
    sampled = SamplingParams(temperature=0.9, seed=7, repetition_penalty=1.2, presence_penalty=0.3)
    hogs = [
        make_request([5, 6, 7 + number], max_tokens=LONG, sampling=sampled) for number in range(4)
    ]
    polite = [make_request([9, number], "polite", max_tokens=SHORT) for number in range(6)]
    async with EngineHarness.start(
        model,
        tmp_path / "adapters",
        adapters=("polite",),
        max_num_seqs=2,
        preempt_after_seconds=0.001,
    ) as harness:
        alone = [await harness.run(request) for request in (*hogs, *polite)]
        before = harness.metrics.registry.get_sample_value("turret_preemptions_total") or 0.0
        begun = asyncio.Event()
        run = partial(harness.run, on_token=lambda _: begun.set())
        running = [asyncio.ensure_future(run(request)) for request in hogs]
        await begun.wait()
        answers = [await harness.run(request) for request in polite]
        together = [*await asyncio.gather(*running), *answers]
        after = harness.metrics.registry.get_sample_value("turret_preemptions_total") or 0.0
    assert after > before
    assert [answer.bits for answer in together] == [answer.bits for answer in alone]


async def test_a_request_that_yields_its_adapters_memory_gets_the_same_bits(tmp_path: Path) -> None:
    model, names = save_tiny_model("llama", tmp_path / "model"), ("hog", "polite")
    for seed, name in enumerate(names):
        write_adapter(tmp_path / "adapters", arch_of(model), AdapterSpec(name, rank=4), seed)
    sampled = SamplingParams(temperature=0.9, seed=7)
    hog = make_request([5, 6, 7], "hog", max_tokens=LONG, sampling=sampled, tenant=b"hog")
    polite = make_request([9, 8], "polite", max_tokens=SHORT, tenant=b"polite")
    async with EngineHarness.start(
        model, tmp_path / "adapters", adapters=names[:1], preempt_after_seconds=0.001
    ) as harness:
        # There is memory for one adapter.
        memory = harness.registry._leases._memory
        memory._budget_bytes = memory.used_bytes
        harness.registry.load("polite", "polite")
        alone = [await harness.run(request) for request in (hog, polite)]
        for _ in range(3):
            begun = asyncio.Event()
            run = partial(harness.run, on_token=lambda _, begun=begun: begun.set())
            running = asyncio.ensure_future(run(hog))
            await begun.wait()
            answer = await harness.run(polite)
            assert answer.finish.adapters_used[0].cold_start
            assert [(await running).bits, answer.bits] == [each.bits for each in alone]
        # Without a preemption, the second request would wait for the end of the first one.
        count = harness.metrics.registry.get_sample_value("turret_preemptions_total") or 0.0
        assert count >= 3
