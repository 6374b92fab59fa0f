"""An answer that continues after given tokens has the bits of an uninterrupted one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
from builders.bases.tiny_models import save_tiny_model
from builders.methods import make_config, save_adapter
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from method_oracle import serve, twin
from said import says
from servers.engine_harness import GREEDY, EngineHarness, make_request

from turret.server.engine.scheduling.request import (
    Request,
    ResponseOptions,
    SamplingParams,
    StopConditions,
)
from turret.server.errors import InvalidRequestError, PromptTooLongError

PROMPT = (5, 9, 2, 7, 30, 11)
NUM_TOKENS = 24
ADAPTERS = ("lora", "prefix_tuning", "prompt_tuning")
SEEDED = SamplingParams(temperature=1.5, seed=7)
SHAPES = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "filtered": SamplingParams(temperature=2.0, top_k=40, top_p=0.9, min_p=0.01, seed=3),
    "penalised": SamplingParams(
        temperature=1.2,
        seed=11,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.7,
        logit_bias={4: 3.0, 8: -5.0},
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, root = twin("llama"), tmp_path_factory.mktemp("resume")
    for method in ADAPTERS:
        save_adapter(base.model, make_config(method), root / method)
    return root


@pytest_asyncio.fixture
async def engine(root: Path) -> AsyncIterator[EngineHarness]:
    async with serve("llama", root, adapters=ADAPTERS) as running:
        yield running


@pytest_asyncio.fixture
async def stepwise(root: Path) -> AsyncIterator[EngineHarness]:
    """Make every token take a separate step and output."""
    async with serve("llama", root, adapters=ADAPTERS, speculation="off") as running:
        yield running


async def check_all_cuts(engine: EngineHarness, stepwise: EngineHarness, request: Request) -> None:
    """Check that the request can be resumed after each of its tokens, all concurrently."""
    whole = await engine.run(request)
    assert len(whole.token_ids) > 3
    cuts = range(1, len(whole.token_ids))
    rest = await engine.run_all(
        [replace(request, answer_so_far=whole.token_ids[:cut]) for cut in cuts]
    )
    texts = await prefixes(stepwise, request, len(whole.token_ids))
    for cut, answer in zip(cuts, rest, strict=True):
        assert answer.token_ids == whole.token_ids[cut:]
        assert answer.logprobs == whole.logprobs[cut:]
        assert answer.top == whole.top[cut:]
        assert texts[cut] + answer.text == whole.text
        assert answer.finish.reason == whole.finish.reason
        assert answer.finish.stop == whole.finish.stop
        assert answer.finish.usage.completion_tokens == len(whole.token_ids)
        assert answer.finish.usage.prompt_tokens == len(PROMPT)


async def prefixes(stepwise: EngineHarness, request: Request, count: int) -> list[str]:
    """The certain text after each number of tokens, from none to all."""
    texts = [""]
    stream = await stepwise.engine.submit(request)
    async for output in stream:
        texts.append(texts[-1] + output.text)
    assert len(texts) == count + 1
    return texts


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_resumed_answer_has_the_bits_of_the_whole(
    engine: EngineHarness, stepwise: EngineHarness, shape: str
) -> None:
    for adapters in ((), *((name,) for name in ADAPTERS)):
        request = make_request(PROMPT, *adapters, max_tokens=NUM_TOKENS, sampling=SHAPES[shape])
        await check_all_cuts(engine, stepwise, request)


async def test_stop_conditions_count_from_the_beginning_of_the_answer(
    engine: EngineHarness, stepwise: EngineHarness
) -> None:
    plain = make_request(PROMPT, max_tokens=NUM_TOKENS, sampling=SEEDED)
    whole = await engine.run(plain)
    # A stop string that spans tokens, one of which would be held back at a cut.
    texts = await prefixes(stepwise, plain, NUM_TOKENS)
    stop = whole.text[len(texts[9]) - 2 : len(texts[11])]
    assert len(stop) > 2
    for conditions in (
        StopConditions(max_tokens=NUM_TOKENS, ignore_eos=True, stop_strings=(stop,)),
        StopConditions(
            max_tokens=NUM_TOKENS, ignore_eos=True, stop_strings=(stop,), include_stop=True
        ),
        StopConditions(
            max_tokens=NUM_TOKENS,
            min_tokens=6,
            stop_token_ids=frozenset({whole.token_ids[2], whole.token_ids[12]}),
        ),
    ):
        await check_all_cuts(engine, stepwise, replace(plain, stop=conditions))


async def test_an_answer_that_has_ended_cannot_be_resumed(engine: EngineHarness) -> None:
    request = make_request(PROMPT, max_tokens=NUM_TOKENS)
    whole = await engine.run(request)
    token = whole.token_ids[4]
    first = whole.token_ids.index(token)
    stopped = replace(
        request, stop=StopConditions(stop_token_ids=frozenset({token}), ignore_eos=True)
    )
    with pytest.raises(InvalidRequestError, check=says("ANSWER_ENDED", index=first)):
        await engine.run(replace(stopped, answer_so_far=whole.token_ids))
    with pytest.raises(InvalidRequestError, check=says("ANSWER_COMPLETE")):
        replace(request, answer_so_far=whole.token_ids)
    with pytest.raises(InvalidRequestError, check=says("CONFLICTS_WITH", other="answer_so_far")):
        replace(request, answer_so_far=(1,), options=ResponseOptions(echo=True))
    with pytest.raises(InvalidRequestError, check=says("NOT_A_TOKEN", value=1 << 20)):
        await engine.run(replace(request, answer_so_far=(1 << 20,)))
    endless = replace(request, stop=StopConditions(ignore_eos=True))
    with pytest.raises(PromptTooLongError):
        await engine.run(replace(endless, answer_so_far=(1,) * engine.engine.max_model_len))
    # Rejected requests leave nothing behind.
    assert (await engine.run(request)).bits == whole.bits


# Requests that yield their places get the same bits as alone.


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
