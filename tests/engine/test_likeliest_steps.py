"""Greedy steps take their tokens from a screened head; the tokens equal those of all logits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import VOCAB_SIZE, save_tiny_model
from builders.constraints import compiled
from builders.random_adapters import ALL, AdapterSpec, arch_of, write_adapter
from servers.engine_harness import EngineHarness, make_request

from turret.kernels import cpu as native
from turret.server.engine.scheduling.request import (
    Request,
    ResponseOptions,
    SamplingParams,
    StopConditions,
)
from turret.server.models.decoding.decoder import Decoder, LikeliestTokens

pytestmark = pytest.mark.skipif(
    native.isa() in {None, "baseline"}, reason="no screen without AVX2's kernels"
)

PLAIN = ResponseOptions()
FAMILIES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": False},
    "granite": {"logits_scaling": 2.0},
    "gemma2": {"final_logit_softcapping": 30.0},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The numbers of steps with and without tokens from the screen."""
    counts: Counter[str] = Counter()
    find = LikeliestTokens.find

    def counting(self: LikeliestTokens, hidden: torch.Tensor) -> list[int] | None:
        found = find(self, hidden)
        counts["logits" if found is None else "screen"] += 1
        return found

    monkeypatch.setattr(LikeliestTokens, "find", counting)
    return counts


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("likeliest")


def served(root: Path, family: str) -> tuple[Path, Path]:
    folder = root / family
    if folder.exists():
        return folder / "model", folder / "adapters"
    model = save_tiny_model(family, folder / "model", changes=FAMILIES[family])
    write_adapter(folder / "adapters", arch_of(model), AdapterSpec("lora8", 8, ALL), 1)
    return model, folder / "adapters"


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return [
        torch.randint(0, VOCAB_SIZE, (3 + 5 * n,), generator=generator).tolist()
        for n in range(count)
    ]


def without_logprobs(requests: list[Request]) -> list[Request]:
    return [replace(r, request_id=f"{r.request_id}-plain", options=PLAIN) for r in requests]


OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "adapters": ["lora8"],
    "max_num_batched_tokens": 256,
}


@pytest.mark.parametrize("family", FAMILIES)
async def test_screened_steps_choose_the_tokens_of_all_logits(
    root: Path, family: str, asked: Counter[str]
) -> None:
    requests = [
        make_request(prompt, *(["lora8"] if n % 2 else []), max_tokens=24)
        for n, prompt in enumerate(prompts(6))
    ]
    options = {**OPTIONS, "speculation": "off"}
    async with EngineHarness.start(*served(root, family), **options) as harness:
        whole = [await harness.run(request) for request in requests]
        assert not asked, "logprobs are asked for"
        together = await harness.run_all(without_logprobs(requests))
        alone = [await harness.run(request) for request in without_logprobs(requests)]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in whole]
    assert [answer.token_ids for answer in alone] == [answer.token_ids for answer in whole]
    assert asked["screen"] > 50, asked


async def test_logits_that_reach_their_cap_are_not_screened(
    root: Path, asked: Counter[str]
) -> None:
    """Different logits may become equal at the cap, and then the first token counts."""
    model = save_tiny_model("gemma2", root / "capped", changes={"final_logit_softcapping": 1.0})
    requests = [make_request(prompt, max_tokens=8) for prompt in prompts(3)]
    async with EngineHarness.start(model, dtype="bfloat16", speculation="off") as harness:
        whole = await harness.run_all(requests)
        plain = await harness.run_all(without_logprobs(requests))
    assert [answer.token_ids for answer in plain] == [answer.token_ids for answer in whole]
    assert asked["logits"]
    assert not asked["screen"]


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": SamplingParams(temperature=0.0, repetition_penalty=1.3)},
        {"sampling": SamplingParams(temperature=0.0, presence_penalty=0.5)},
        {"sampling": SamplingParams(temperature=0.0, frequency_penalty=0.5)},
        {"sampling": SamplingParams(temperature=0.0, logit_bias={3: 50.0, 4: -50.0})},
        {"sampling": SamplingParams(temperature=0.8, seed=1)},
        {"options": ResponseOptions(logprobs=True)},
    ],
    ids=["repetition", "presence", "frequency", "bias", "drawn", "logprobs"],
)
async def test_a_request_for_more_logits_gets_all_of_them(
    root: Path, asked: Counter[str], changes: dict[str, Any]
) -> None:
    """The other requests of the step also get all logits, with the same tokens as alone."""
    first, second = prompts(2)
    plain = make_request(first, max_tokens=12, options=PLAIN)
    other = make_request(second, max_tokens=12, **{"options": PLAIN, **changes})
    async with EngineHarness.start(*served(root, "llama"), **OPTIONS) as harness:
        alone = await harness.run(plain)
        told = asked.total()
        assert told
        expected = await harness.run(other)
        assert asked.total() == told
        again = [replace(r, request_id=f"{r.request_id}-2") for r in (plain, other)]
        answers = await harness.run_all(again)
    assert [a.token_ids for a in answers] == [alone.token_ids, expected.token_ids]


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each computation of all logits."""
    rows: list[int] = []
    logits = Decoder.logits

    def counting(self: Decoder, hidden: torch.Tensor, *more: Any) -> torch.Tensor:
        rows.append(len(hidden))
        return logits(self, hidden, *more)

    monkeypatch.setattr(Decoder, "logits", counting)
    return rows


# Enough steps for tokens with and without a bias.
_STEPS = 24


@pytest.mark.parametrize("pattern", [None, r"[\s\S]*"])
@pytest.mark.parametrize("speculation", ["auto", "off"])
@pytest.mark.parametrize(
    "lower",
    [
        lambda tokens: {tokens[3]: -50.0},
        lambda tokens: dict.fromkeys(tokens, -0.1),
        lambda tokens: dict.fromkeys(tokens, -50.0),
    ],
    ids=["one", "slightly", "all"],
)
async def test_negative_biases_need_all_logits_only_for_their_tokens(
    root: Path,
    asked: Counter[str],
    whole: list[int],
    lower: Any,
    speculation: str,
    pattern: str | None,
) -> None:
    """The likeliest token is the next one unless its own logit is lowered."""
    prompt = prompts(3)[2]
    constraint = None if pattern is None else compiled("regex", pattern)
    options = {**OPTIONS, "speculation": speculation}
    async with EngineHarness.start(*served(root, "llama"), **options) as harness:
        free = await harness.run(make_request(prompt, max_tokens=_STEPS))
        sampling = SamplingParams(temperature=0.0, logit_bias=lower(free.token_ids))
        request = make_request(prompt, max_tokens=_STEPS, sampling=sampling, constraint=constraint)
        expected = await harness.run(request)
        assert not asked, "logprobs are asked for"
        alone = replace(request, request_id=f"{request.request_id}-alone", options=PLAIN)
        await harness.run(alone)
        assert asked["screen"], "a negative bias disables the screen"
        asked.clear()
        whole.clear()
        answers = await harness.run_all(
            [
                *without_logprobs([request]),
                make_request(prompt, max_tokens=_STEPS, options=PLAIN),
            ]
        )
    assert [answer.token_ids for answer in answers] == [expected.token_ids, free.token_ids]
    # With speculation, all tokens can be drafts of one step, which has too many rows to screen.
    assert asked["screen"] or speculation == "auto"
    assert whole, "the likeliest token has a bias"


async def test_end_tokens_are_banned_until_min_tokens(
    root: Path, asked: Counter[str], whole: list[int]
) -> None:
    """Only a step whose likeliest token is banned, and the step after it, need all logits."""
    prompt = prompts(3)[2]
    async with EngineHarness.start(*served(root, "llama"), **OPTIONS) as harness:
        free = await harness.run(make_request(prompt, max_tokens=12))
        banned = free.token_ids[1]
        stop = StopConditions(max_tokens=12, min_tokens=12, stop_token_ids=frozenset({banned}))
        expected = await harness.run(make_request(prompt, stop=stop))
        assert not asked
        assert expected.token_ids != free.token_ids
        whole.clear()
        plain = await harness.run(make_request(prompt, stop=stop, options=PLAIN))
        assert plain.token_ids == expected.token_ids
        assert 0 < len(whole) < 12
        # A ban that concerns no likeliest token costs nothing.
        unlikely = next(n for n in range(VOCAB_SIZE) if n not in free.token_ids)
        stop = replace(stop, stop_token_ids=frozenset({unlikely}))
        whole.clear()
        plain = await harness.run(make_request(prompt, stop=stop, options=PLAIN))
        assert plain.token_ids == free.token_ids
        assert not whole
        stop = replace(stop, min_tokens=6, stop_token_ids=frozenset({banned}))
        expected = await harness.run(make_request(prompt, stop=stop))
        plain = await harness.run(make_request(prompt, stop=stop, options=PLAIN))
        assert plain.token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        (r"[\s\S]*", range(3, 13)),  # allows all tokens but ends and broken letters
        ("[ab]{12}", range(1)),  # forbids nearly all tokens
    ],
)
async def test_a_grammar_checks_the_likeliest_token_first(
    root: Path, asked: Counter[str], whole: list[int], pattern: str, told: range
) -> None:
    """If the grammar rejects a token, this step and the next ones use all logits."""
    constraint = compiled("regex", pattern)
    prompt, other = prompts(2)
    request = make_request(prompt, max_tokens=12, constraint=constraint)
    free = make_request(other, max_tokens=12)
    async with EngineHarness.start(*served(root, "llama"), **OPTIONS) as harness:
        expected = [await harness.run(request), await harness.run(free)]
        assert not asked
        whole.clear()
        [alone] = await harness.run_all(without_logprobs([request]))
        count = len(whole)
        together = await harness.run_all(
            [replace(r, request_id=f"{r.request_id}-2", options=PLAIN) for r in (request, free)]
        )
    assert alone.token_ids == expected[0].token_ids
    assert [a.token_ids for a in together] == [a.token_ids for a in expected]
    assert len(alone.token_ids) - count in told, (count, asked)


async def test_drafts_are_checked_with_the_screen(root: Path, asked: Counter[str]) -> None:
    pattern = prompts(1)[0] * 12
    request = make_request(pattern, max_tokens=48)
    async with EngineHarness.start(*served(root, "llama"), speculation="off", **OPTIONS) as harness:
        expected = await harness.run(request)
    async with EngineHarness.start(*served(root, "llama"), **OPTIONS) as harness:
        [request] = without_logprobs([request])
        answer = await harness.run(request)
    assert answer.token_ids == expected.token_ids
    assert 0 < asked["screen"] < 48, "some steps gave several tokens"


async def test_the_screen_can_be_disabled(root: Path, asked: Counter[str]) -> None:
    request = make_request(prompts(1)[0], max_tokens=8, options=PLAIN)
    folders = served(root, "llama")
    async with EngineHarness.start(*folders, **OPTIONS) as harness:
        expected = await harness.run(request)
    asked.clear()
    async with EngineHarness.start(*folders, head_screen=False, **OPTIONS) as harness:
        [again] = without_logprobs([request])
        answer = await harness.run(again)
    assert answer.token_ids == expected.token_ids
    assert not asked
