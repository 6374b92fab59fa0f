"""Edge cases of the engine on a real model: reported once, correctly, and never fatal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import VOCAB_SIZE, save_tiny_model, tiny_tokenizer
from builders.facts import mix_of
from said import says
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters.adapter import AdapterRef
from turret.server.engine.scheduling.request import (
    FinishReason,
    Request,
    ResponseOptions,
    SamplingParams,
    StopConditions,
)
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step.sampler import Sampler
from turret.server.errors import AdapterNotFoundError, InvalidRequestError, PromptTooLongError
from turret.server.models.decoding import cpu_layers
from turret.server.models.decoding.layer_ops import KvCache

ECHO = ResponseOptions(logprobs=True, echo=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("edges") / "model")


@pytest.mark.parametrize("length", [1, 2, 30, 150])
async def test_prompt_logprobs_are_returned_once(model: Path, length: int) -> None:
    prompt = list(range(length))
    async with EngineHarness.start(model) as harness:
        echoed = await harness.run(make_request(prompt, max_tokens=5, options=ECHO))
        scored = await harness.run(make_request(prompt, score=True))
        assert len(echoed.prompt_logprobs) == length
        assert echoed.prompt_logprobs == scored.prompt_logprobs
        assert len(echoed.token_ids) == 5
        assert (scored.token_ids, scored.finish.usage.completion_tokens) == ((), 0)


async def test_prompt_logprobs_are_returned_once_despite_preemption(
    model: Path, preempted: list[tuple[Any, int]]
) -> None:
    async with EngineHarness.start(model, kv_cache_bytes=1 << 20) as harness:
        requests = [make_request([i, *range(60)], max_tokens=60, options=ECHO) for i in range(16)]
        answers = await harness.run_all(requests)
    assert max(count for _, count in preempted) > 0, (
        "no answer was interrupted after its first token"
    )
    assert {len(a.prompt_logprobs) for a in answers} == {61}
    assert {len(a.token_ids) for a in answers} == {60}
    counted_there = harness.metrics.registry.get_sample_value("turret_preemptions_total")
    assert counted_there == len(preempted)


async def test_metrics_are_true_after_a_cancellation(model: Path) -> None:
    async with EngineHarness.start(model) as harness:
        answer = await harness.run(make_request([1, 2, 3], max_tokens=400), cancel_after=2)
        assert answer.finish.reason is FinishReason.CANCELLED
    value = harness.metrics.registry.get_sample_value
    assert value("turret_kv_blocks", {"state": "used"}) == 0
    assert value("turret_sequences", {"state": "running"}) == 0
    assert value("turret_sequences", {"state": "waiting"}) == 0


async def test_token_ids_beyond_the_model_are_rejected(tmp_path: Path) -> None:
    model = save_tiny_model("qwen2", tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>", "<more>"])
    tokenizer.save_pretrained(model)
    outside = [
        {"prompt_token_ids": (1, VOCAB_SIZE)},
        {"sampling": SamplingParams(logit_bias={VOCAB_SIZE + 1: 1.0})},
        {
            "stop": StopConditions(
                stop_token_ids=frozenset({VOCAB_SIZE}), min_tokens=1, max_tokens=2
            )
        },
    ]
    async with EngineHarness.start(model) as harness:
        for changes in outside:
            with pytest.raises(InvalidRequestError):
                await harness.run(make_request([1, 2], **changes))
        assert len((await harness.run(make_request([1, VOCAB_SIZE - 1]))).token_ids) == 8


async def test_refused_requests_leave_the_engine_as_it_was(model: Path) -> None:
    refused: list[tuple[type[Exception], dict[str, Any]]] = [
        (InvalidRequestError, {"prompt_token_ids": (-1,)}),
        (PromptTooLongError, {"prompt_token_ids": (1,) * 513}),
        (PromptTooLongError, {"stop": StopConditions(max_tokens=600)}),
        (AdapterNotFoundError, {"adapters": (AdapterRef(name="nobody"),)}),
    ]
    async with EngineHarness.start(model) as harness:
        before = await harness.run(make_request([5, 6, 7]))
        for error, changes in refused:
            with pytest.raises(error):
                await harness.run(make_request([1, 2], **changes))
        assert (await harness.run(make_request([5, 6, 7]))).bits == before.bits


async def test_a_prompt_that_is_too_long_is_reported_once(model: Path) -> None:
    alone: dict[str, Any] = {"prompt_token_ids": (1,) * 513}
    with_answer: dict[str, Any] = {"prompt_token_ids": (1,), "stop": StopConditions(max_tokens=600)}
    async with EngineHarness.start(model) as harness:
        for changes, check in (
            (alone, says("CONTEXT_TOO_SHORT", prompt_tokens=513)),
            (with_answer, says("MAX_TOKENS_TOO_LARGE", prompt_tokens=1, max_tokens=600, room=511)),
        ):
            with pytest.raises(PromptTooLongError, check=check) as raised:
                await harness.run(make_request([1, 2], **changes))
            error = raised.value
            # Clients print violations that the message omits.
            assert all(why in error.message for _, why in error.violations)


async def test_the_whole_context_can_be_used(model: Path) -> None:
    async with EngineHarness.start(model) as harness:
        full = await harness.run(make_request([3] * 500, max_tokens=12))
        assert full.finish.reason is FinishReason.LENGTH
        assert len(full.token_ids) == 12
        scored = await harness.run(make_request([3] * 512, score=True))
        assert len(scored.prompt_logprobs) == 512


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.05}])
def test_a_temperature_near_zero_draws_the_likeliest_token(
    temperature: float, filters: dict[str, Any]
) -> None:
    for seed in range(20):
        logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(seed)) * 3
        request = Request(
            request_id="r",
            prompt_token_ids=(1,),
            sampling=SamplingParams(temperature=temperature, seed=seed, **filters),
        )
        sequence = Sequence(request, mix_of(""), 0.0)
        (draw,) = Sampler().draw(logits.clone(), [sequence])
        assert draw.token_id == int(logits.argmax())


async def test_a_nan_of_a_blocks_previous_owner_does_not_spread(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled kernels do not read such positions (``test_isa.py``); torch's attention does."""
    monkeypatch.setattr(cpu_layers, "has_layer_ops", lambda *_: False)
    request, answers, made = make_request([1, 2, 3], max_tokens=4), [], KvCache.__init__
    for value in (0.0, torch.nan):

        def make(cache: KvCache, *arguments: Any, value: float = value) -> None:
            made(cache, *arguments)
            cache.keys[:, 1:] = cache.values[:, 1:] = value

        monkeypatch.setattr(KvCache, "__init__", make)
        async with EngineHarness.start(model) as harness:
            answers.append((await harness.run(request)).bits)
    assert answers[0] == answers[1]
