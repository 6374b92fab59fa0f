"""Answers that end, are interrupted or continue in the middle of a correct draft."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from builders.bases.tiny_models import VOCAB_SIZE
from builders.methods import make_config, save_adapter
from method_oracle import prompt_of, serve, twin
from servers.engine_harness import Answer, EngineHarness, make_request
from servers.planted_drafts import PlantedDrafts

from turret.server.engine.scheduling.request import (
    FinishReason,
    Request,
    ResponseOptions,
    SamplingParams,
    StopConditions,
)

NUM_TOKENS = 40
PROMPT = tuple(prompt_of(21, 4))
SAMPLED = SamplingParams(temperature=1.3, seed=9)
ADAPTERS = ("lora", "prefix_tuning", "prompt_tuning")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ends")
    for method in ADAPTERS:
        save_adapter(twin("llama").model, make_config(method), folder / method)
    return folder


@pytest_asyncio.fixture
async def plain(root: Path) -> AsyncIterator[EngineHarness]:
    """Compute every token in a separate step."""
    async with serve("llama", root, adapters=ADAPTERS, speculation="off") as harness:
        yield harness


@pytest_asyncio.fixture
async def drafting(root: Path) -> AsyncIterator[EngineHarness]:
    async with serve("llama", root, adapters=ADAPTERS) as harness:
        yield harness


def asked(*adapters: str, **changes: Any) -> Request:
    request = make_request(PROMPT, *adapters, max_tokens=NUM_TOKENS, sampling=SAMPLED)
    return replace(request, **changes)


def right(answer: Answer, seed: int = 0) -> PlantedDrafts:
    """A drafter that copies an answer without an early end."""
    return PlantedDrafts({PROMPT: answer.token_ids}, VOCAB_SIZE, seed)


def conditions(answer: Answer) -> list[StopConditions]:
    """Conditions that end this answer somewhere in the middle."""
    text, ids = answer.text, answer.token_ids
    middle = text[len(text) // 2 : len(text) // 2 + 5]
    late = frozenset({ids[25]})
    most: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    return [
        StopConditions(**most, stop_strings=(middle,)),
        StopConditions(**most, stop_strings=(middle, "never there"), include_stop=True),
        StopConditions(**most, stop_token_ids=late),
        StopConditions(**most, stop_token_ids=late, include_stop=True, min_tokens=20),
        StopConditions(max_tokens=NUM_TOKENS, min_tokens=30, stop_token_ids=late),
        StopConditions(max_tokens=7, ignore_eos=True),
        StopConditions(max_tokens=1, ignore_eos=True),
    ]


@pytest.mark.parametrize("adapters", [(), ("lora",), ("prefix_tuning",), ("prompt_tuning",)])
async def test_answers_end_at_the_same_token_with_and_without_drafts(
    plain: EngineHarness, drafting: EngineHarness, adapters: Sequence[str]
) -> None:
    whole = await plain.run(asked(*adapters))
    stops = conditions(whole)
    requests = [asked(*adapters, stop=stop) for stop in stops]
    expected = [await plain.run(request) for request in requests]
    assert {one.finish.reason for one in expected} == {FinishReason.STOP, FinishReason.LENGTH}
    assert len({one.token_ids for one in expected}) > 3
    for seed in range(2):
        with right(whole, seed).planted():
            found = [await drafting.run(request) for request in requests]
        for one, other in zip(found, expected, strict=True):
            assert one.bits == other.bits
            assert one.finish.reason == other.finish.reason
            assert one.finish.stop == other.finish.stop
            ended = one.finish.usage
            assert ended.completion_tokens == other.finish.usage.completion_tokens


async def test_the_rest_of_an_answer_is_drafted_too(
    plain: EngineHarness, drafting: EngineHarness
) -> None:
    whole = await plain.run(asked("lora"))
    for cut in (1, 8, 23):
        request = asked("lora", answer_so_far=whole.token_ids[:cut])
        with right(whole, cut).planted():
            rest = await drafting.run(request)
        assert rest.token_ids == whole.token_ids[cut:]
        assert rest.logprobs == whole.logprobs[cut:]
        assert rest.finish.usage.completion_tokens == NUM_TOKENS


async def test_prompt_logprobs_and_echo_do_not_change(
    plain: EngineHarness, drafting: EngineHarness
) -> None:
    request = asked(options=ResponseOptions(logprobs=True, top_n=2, echo=True))
    whole = await plain.run(request)
    with right(whole).planted():
        assert (await drafting.run(request)).bits == whole.bits
    assert len(whole.prompt_logprobs) == len(PROMPT)


async def test_the_prefix_cache_has_the_same_blocks(
    plain: EngineHarness, drafting: EngineHarness
) -> None:
    """A continuation of prompt and answer finds as many blocks, with the same contents."""
    whole = await plain.run(asked("lora"))
    drafts = right(whole)
    stop = conditions(whole)[0]
    with drafts.planted():
        for request in (asked("lora", stop=stop), asked("lora")):
            await drafting.run(request)
    await plain.run(asked("lora", stop=stop))
    assert drafts.num_right > 10
    for end in (16, 30, NUM_TOKENS):
        longer = make_request((*PROMPT, *whole.token_ids[:end], 3), "lora", max_tokens=3)
        expected, found = await plain.run(longer), await drafting.run(longer)
        assert found.bits == expected.bits
        assert found.finish.usage == expected.finish.usage
        assert found.finish.usage.cached_tokens >= (len(PROMPT) + end) // 16 * 16 - 16


async def test_a_cancelled_answer_is_a_prefix_of_the_whole(
    plain: EngineHarness, drafting: EngineHarness
) -> None:
    whole = await plain.run(asked())
    for count in (1, 2, 9):
        with right(whole, count).planted():
            cut = await drafting.run(asked(), cancel_after=count)
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert len(cut.token_ids) >= count
        assert cut.logprobs == whole.logprobs[: len(cut.token_ids)]
    await asyncio.sleep(0.05)
    value = drafting.metrics.registry.get_sample_value
    assert value("turret_kv_blocks", {"state": "used"}) == 0


async def test_a_deadline_ends_an_answer_between_two_steps(
    plain: EngineHarness, drafting: EngineHarness
) -> None:
    request = asked(stop=StopConditions(max_tokens=400, ignore_eos=True))
    whole = await plain.run(request)
    with right(whole).planted():
        late = await drafting.run(replace(request, deadline=time.monotonic() + 0.05))
    assert late.finish.reason is FinishReason.DEADLINE
    assert late.token_ids == whole.token_ids[: len(late.token_ids)]
    assert late.finish.usage.completion_tokens == len(late.token_ids)
