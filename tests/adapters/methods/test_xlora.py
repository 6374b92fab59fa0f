"""X-LoRA, served by the engine and compared with PEFT's forward pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.methods import load_adapter
from builders.mixes.xloras import KINDS, save_loras, save_xlora
from method_oracle import (
    check_greedy,
    check_oracles,
    check_rounding,
    check_score,
    prompt_of,
    twin,
)
from said import says
from servers.engine_harness import EngineHarness, make_request
from servers.gpu_serving import gpu_serving

from turret.server.adapters.adapter import AdapterRef
from turret.server.engine.scheduling.request import Request
from turret.server.engine.scheduling.scheduler import Scheduler
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.errors import InvalidRequestError, PromptTooLongError

COMPONENTS = ("0", "1", "2")


def save_all(model: Any, root: Path, *names: str) -> dict[str, Any]:
    save_loras(model, root)
    return {name: save_xlora(model, root, name, **KINDS[name]) for name in names}


@pytest.mark.parametrize("architecture", ["llama", pytest.param("qwen2", marks=pytest.mark.long)])
async def test_scores_and_answers_match_peft(architecture: str, tmp_path: Path) -> None:
    base = twin(architecture)
    oracles = save_all(base.model, tmp_path, *KINDS)
    await check_oracles(base, tmp_path, [*COMPONENTS, *KINDS], oracles.items())


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
async def test_bits_do_not_depend_on_other_requests(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits are the same in chunks, beside other rows, from the cache, and after preemption."""
    base = twin("llama")
    names = ("deep", "constant")
    save_all(base.model, tmp_path, *names)
    prompts = [prompt_of(length, seed) for seed, length in enumerate((150, 101, 9))]
    own = [(name, prompt) for name in names for prompt in prompts]

    def asked(name: str, prompt: list[int]) -> Request:
        return make_request(prompt, name, max_tokens=40)

    alone = []
    async with EngineHarness.start(
        base.folder,
        tmp_path,
        dtype=dtype,
        adapters=[*COMPONENTS, *names],
        max_num_batched_tokens=256,
    ) as harness:
        for name, prompt in own:
            alone.append((await harness.run(asked(name, prompt))).bits)
            again = await harness.run(asked(name, prompt))
            assert again.finish.usage.cached_tokens == (len(prompt) - 1) // 16 * 16
            assert again.bits == alone[-1]
    preempted: list[Sequence] = []
    preempt = Scheduler._preempt

    def counted(self: Scheduler, sequence: Sequence, now: float) -> None:
        preempted.append(sequence)
        preempt(self, sequence, now)

    monkeypatch.setattr(Scheduler, "_preempt", counted)
    # Admit requests even if blocks will run out later.
    monkeypatch.setattr(Scheduler, "_will_run_out", lambda *_: False)
    async with EngineHarness.start(
        base.folder,
        tmp_path,
        dtype=dtype,
        adapters=[*COMPONENTS, *names],
        max_num_batched_tokens=37,
    ) as harness:
        # Fewer blocks than --kv-cache-bytes can configure.
        blocks = harness.engine._loop._scheduler.blocks
        blocks.num_blocks = 60
        for block in list(blocks._free)[blocks.num_blocks - 1 :]:
            del blocks._free[block]
        others = [make_request(p, n, max_tokens=40) for p in prompts for n in COMPONENTS]
        others += [make_request(prompt, max_tokens=40) for prompt in prompts]
        answers = await harness.run_all([*others, *(asked(*each) for each in own)])
        assert [answer.bits for answer in answers[len(others) :]] == alone
    assert any(sequence.first_pass is not None for sequence in preempted)


async def test_the_first_pass_of_an_xlora_shares_blocks_with_the_base(tmp_path: Path) -> None:
    base = twin("llama")
    oracles = save_all(base.model, tmp_path, "deep", "constant")
    prompt = prompt_of(70, 5)
    async with EngineHarness.start(
        base.folder, tmp_path, adapters=[*COMPONENTS, *oracles]
    ) as harness:
        plain = await harness.run(make_request(prompt, max_tokens=3))
        # Its own keys and values are not computed yet.
        first = await harness.run(make_request(prompt, "deep", max_tokens=3))
        assert first.finish.usage.cached_tokens == 0
        again = await harness.run(make_request(prompt, max_tokens=3))
        assert again.bits == plain.bits
        other = await harness.run(make_request(prompt_of(64, 6), "deep", max_tokens=3))
        shared = await harness.run(make_request([*prompt_of(64, 6), 1, 2], max_tokens=3))
        assert shared.finish.usage.cached_tokens == 64
        assert other.token_ids
        await harness.run(make_request(prompt_of(64, 7), "constant", max_tokens=3))
        alone = await harness.run(make_request([*prompt_of(64, 7), 1, 2], max_tokens=3))
        assert alone.finish.usage.cached_tokens == 0
        check_greedy(first, oracles["deep"], prompt, "beside the base's blocks")


async def test_mixes_are_sums_of_changes(tmp_path: Path) -> None:
    """With weight 0 for one member, the other acts alone.

    Two members with a first pass are rejected.
    """
    base = twin("llama")
    save_all(base.model, tmp_path, "deep", "shallow")
    prompt = prompt_of(20, 4)
    async with EngineHarness.start(
        base.folder, tmp_path, adapters=[*COMPONENTS, "deep", "shallow"], kv_cache_bytes=1 << 20
    ) as harness:
        alone = await harness.run(make_request(prompt, "deep", score=True))
        ref = AdapterRef(name="0", weight=0.0)
        mixed = await harness.run(make_request(prompt, "deep", ref, score=True))
        assert mixed.prompt_logprobs == alone.prompt_logprobs
        off = AdapterRef(name="deep", weight=0.0)
        lora = await harness.run(make_request(prompt, "0", score=True))
        switched = await harness.run(make_request(prompt, "0", off, score=True))
        assert switched.prompt_logprobs == lora.prompt_logprobs
        both = await harness.run(make_request(prompt, "0", "deep", score=True))
        assert both.prompt_logprobs not in (alone.prompt_logprobs, lora.prompt_logprobs)
        with pytest.raises(InvalidRequestError, check=says("SEVERAL_FIRST_PASSES")):
            await harness.run(make_request(prompt, "deep", "shallow"))


async def test_an_xlora_at_weight_0_is_the_base(tmp_path: Path) -> None:
    """In every step, its rows get scalings that no adapter reads."""
    base = twin("llama")
    save_all(base.model, tmp_path, "deep")
    prompt, off = prompt_of(20, 4), AdapterRef(name="deep", weight=0.0)
    async with EngineHarness.start(
        base.folder, tmp_path, dtype="bfloat16", adapters=[*COMPONENTS, "deep"]
    ) as harness:
        switched = await harness.run(make_request(prompt, off, max_tokens=5))
        plain = await harness.run(make_request(prompt, max_tokens=5))
        assert switched.bits == plain.bits


async def test_a_prompt_that_needs_all_blocks_twice_is_refused(tmp_path: Path) -> None:
    base = twin("llama")
    save_all(base.model, tmp_path, "shallow")
    adapters = [*COMPONENTS, "shallow"]
    # 64 blocks in fp32, including one for padding.
    async with EngineHarness.start(
        base.folder, tmp_path, adapters=adapters, kv_cache_bytes=1 << 20
    ) as harness:
        assert 496 <= harness.engine.max_model_len < 1000
        assert (await harness.run(make_request(prompt_of(496 - 3), "shallow", max_tokens=3))).text
        with pytest.raises(PromptTooLongError):
            await harness.run(make_request(prompt_of(496 - 2), "shallow", max_tokens=3))
        assert (await harness.run(make_request(prompt_of(496 - 2), max_tokens=3))).text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter needs CPU tensors")
@pytest.mark.long
async def test_the_gpu_path_equals_peft(tmp_path: Path) -> None:
    """The X-LoRA runs beside the base, a LoRA and another X-LoRA with its own first pass."""
    base = twin("llama")
    oracles = save_all(base.model, tmp_path, "deep", "constant")
    names = [None, "deep", "constant", "0", "deep"]
    asked = [(name, prompt_of(n, n)) for name, n in zip(names, (40, 70, 30, 5, 3), strict=True)]
    async with gpu_serving(base.folder, tmp_path, [*COMPONENTS, *oracles]) as harness:
        answers = await harness.run_all(
            [make_request(p, *([n] if n else []), max_tokens=3) for n, p in asked]
        )
        scored = await harness.run(make_request(asked[1][1], "deep", score=True))
        # Captured steps of other requests, before and after, are not affected.
        again = await harness.run(make_request(asked[0][1], max_tokens=3))
    for (name, prompt), answer in zip(asked, answers, strict=True):
        model: Any = oracles.get(name or "", base.model)
        if name == "0":
            model = load_adapter(base.model, tmp_path / "0")
        check_greedy(answer, model, prompt, f"{name}")
    check_score(scored, oracles["deep"], asked[1][1], "deep")
    assert again.token_ids == answers[0].token_ids


@pytest.mark.parametrize("name", ["deep", pytest.param("constant", marks=pytest.mark.long)])
async def test_bfloat16_is_as_close_as_peft_in_bfloat16(name: str, tmp_path: Path) -> None:
    base = twin("llama", torch.bfloat16)
    save_loras(base.model, tmp_path, strength=0.3)
    exact = save_xlora(base.model, tmp_path, name, **KINDS[name])
    rounded: Any = copy.deepcopy(exact).bfloat16()
    rounded.base_model.internal_xlora_classifier.dtype = torch.bfloat16
    await check_rounding(base, tmp_path, [*COMPONENTS, name], exact, rounded)
