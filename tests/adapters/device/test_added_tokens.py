"""Adapters with tokens that the base lacks, against PEFT on a resized model, and in a batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.added_tokens import END, FIRST, ROWS, save_grown
from builders.bases.tiny_models import tiny_tokenizer
from builders.methods import make_config, save_adapter
from method_oracle import check_greedy, check_request, check_score, prompt_of, serve, twin
from said import says
from servers.engine_harness import EngineHarness, make_request

from turret.server.engine.scheduling.request import SamplingParams, StopConditions
from turret.server.errors import InvalidRequestError

Q = {"target_modules": ["q_proj"]}
BOTH = ["embed_tokens", "lm_head"]
NEW = [FIRST + 2, FIRST, 7, ROWS - 1]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # The vocabulary is not trained: its new rows are those from the resizing.
    "frozen": ("lora", Q),
    "saved": ("lora", {**Q, "modules_to_save": BOTH}),
    "saved-tied": ("dora", {**Q, "modules_to_save": BOTH[:1], "ensure_weight_tying": True}),
    "saved-embedding": ("loha", {**Q, "modules_to_save": BOTH[:1]}),
    "tokens": ("lora", {**Q, "trainable_token_indices": NEW}),
    "tokens-both": ("rslora", {**Q, "trainable_token_indices": dict.fromkeys(BOTH, NEW)}),
    "lora-both": ("lora", {"target_modules": ["q_proj", *BOTH]}),
    "dora-head": ("dora", {"target_modules": ["lm_head"], "modules_to_save": BOTH[:1]}),
}
# These files lack the head's new rows if the base's head is not tied to its embedding.
TIED_ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens-only": ("trainable_tokens", {"token_indices": NEW}),
    "lora-embedding": ("lora", {"target_modules": ["q_proj", "embed_tokens"]}),
}


def prompt_with(length: int, seed: int = 0) -> list[int]:
    """Random text in which every third token is an added one."""
    plain = prompt_of(length, seed)
    return [FIRST + i % 5 if i % 3 == 1 else token for i, token in enumerate(plain)]


async def own_request(
    harness: EngineHarness, prompt: list[int], *names: Any, **changes: Any
) -> Any:
    """A request in the tokens of the adapter that has its own vocabulary."""
    text = (await harness.vocabulary_of(*names)).own
    return make_request(prompt, *names, own_tokenizer=text, **changes)


async def check_own(
    harness: EngineHarness, oracle: Any, prompt: list[int], name: str, **changes: Any
) -> Any:
    """Compare an adapter that has its own vocabulary with the reference."""
    text = (await harness.vocabulary_of(name)).own
    return await check_request(harness, oracle, prompt, name, own_tokenizer=text, **changes)


def variants_of(architecture: str) -> dict[str, tuple[str, dict[str, Any]]]:
    return {**VARIANTS, **(TIED_ALONE if architecture == "qwen2" else {})}


def save_all(architecture: str, root: Path) -> dict[str, Any]:
    model, oracles = twin(architecture).model, {}
    for seed, (name, (method, keys)) in enumerate(variants_of(architecture).items()):
        config = make_config(method, **keys)
        oracles[name] = save_grown(model, config, root / name, seed=seed)
    return oracles


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
async def test_scores_and_answers_match_peft(architecture: str, tmp_path: Path) -> None:
    """Llama has separate matrices for embedding and head; in qwen2 they are tied."""
    oracles = save_all(architecture, tmp_path)
    async with serve(
        architecture, tmp_path, adapters=list(oracles), max_num_batched_tokens=24, max_num_seqs=8
    ) as harness:
        drawn = set[int]()
        for name, oracle in oracles.items():
            for prompt in (prompt_with(37, 1), prompt_with(6, 2), [FIRST]):
                drawn.update((await check_own(harness, oracle, prompt, name)).token_ids)
        assert any(token >= FIRST for token in drawn), "no answer has an added token"


@pytest.mark.parametrize("architecture", ["gemma2", "granite"])
async def test_embedding_scales_and_logit_caps_apply_to_added_tokens(
    architecture: str, tmp_path: Path
) -> None:
    """Embeddings that are scaled, and logits that are capped or divided."""
    config = make_config("lora", **Q, modules_to_save=BOTH)
    oracle = save_grown(twin(architecture).model, config, tmp_path / "grown")
    async with serve(architecture, tmp_path, adapters=["grown"]) as harness:
        await check_own(harness, oracle, prompt_with(21), "grown")


async def test_removed_padding_rows_are_never_sampled(tmp_path: Path) -> None:
    """A base with more rows than its tokenizer has tokens, resized to the tokenizer's length."""
    rows, model = 240, twin("llama").model
    config = make_config("lora", **Q, modules_to_save=BOTH)
    tokenizer = tiny_tokenizer(rows - 2)
    oracle = save_grown(model, config, tmp_path / "fewer", rows=rows, tokenizer=tokenizer)
    base = shutil.copytree(twin("llama").folder, tmp_path / "base")
    tokenizer.save_pretrained(base)
    async with EngineHarness.start(base, tmp_path, adapters=["fewer"]) as harness:
        prompt = [token % rows for token in prompt_of(23)]
        await check_own(harness, oracle, prompt, "fewer", max_tokens=16)


SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, seed=5, repetition_penalty=1.2)


async def _requests(harness: EngineHarness, names: list[str]) -> list[Any]:
    requests = []
    for number, name in enumerate(names):
        changes: dict[str, Any] = {"max_tokens": 5, "score": number % 4 == 3}
        if number % 3 == 1:
            changes["sampling"] = SAMPLED
        prompt = prompt_with((3, 40, 11, 29)[number % 4], number)
        requests.append(await own_request(harness, prompt, name, **changes))
        requests.append(make_request(prompt_of(17, number), "lora", **changes))
        requests.append(make_request(prompt_of(9, number), **changes))
    prompt = prompt_with(12)
    requests.append(await own_request(harness, prompt, ("lora", -0.5), "saved"))
    bias = SamplingParams(temperature=0.0, logit_bias={FIRST + 3: 100.0, ROWS - 20: -5.0})
    requests.append(await own_request(harness, prompt, "frozen", sampling=bias))
    return requests


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_each_request_gets_the_bits_it_gets_alone(dtype: str, tmp_path: Path) -> None:
    save_all("qwen2", tmp_path)
    save_adapter(twin("qwen2").model, make_config("lora"), tmp_path / "lora")
    names = [*variants_of("qwen2"), "lora"]
    folder = twin("qwen2").folder
    base = [make_request(prompt_of(9, number), max_tokens=5) for number in (0, 2)]
    async with EngineHarness.start(folder, dtype=dtype) as harness:
        untouched = [await harness.run(request) for request in base]
    async with EngineHarness.start(folder, tmp_path, dtype=dtype, adapters=names) as harness:
        requests = await _requests(harness, list(variants_of("qwen2")))
        together = await harness.run_together_and_alone(requests)
        backwards = await harness.run_all(requests[::-1])
    assert [a.bits for a in backwards[::-1]] == [a.bits for a in together]
    assert [together[number].bits for number in (2, 8)] == [answer.bits for answer in untouched]
    assert set(together[-1].token_ids) == {FIRST + 3}


async def test_drafts_with_added_tokens_change_no_bit(tmp_path: Path) -> None:
    save_grown(twin("qwen2").model, make_config("lora", **Q), tmp_path / "grown")
    answers = []
    for speculation in ("off", "auto"):
        async with serve("qwen2", tmp_path, adapters=["grown"], speculation=speculation) as harness:
            sampling = SamplingParams(temperature=0.0, logit_bias={FIRST: 9.0, FIRST + 3: 9.5})
            prompt = [FIRST, 5, FIRST + 3, 6] * 6
            request = await own_request(harness, prompt, "grown", sampling=sampling, max_tokens=24)
            answers.append([await harness.run(request) for _ in range(3)])
    assert [a.bits for a in answers[0]] == [a.bits for a in answers[1]]
    assert any(token >= FIRST for token in answers[0][0].token_ids)


async def test_an_answer_ends_at_the_adapters_own_end_token(tmp_path: Path) -> None:
    save_grown(twin("llama").model, make_config("lora", **Q), tmp_path / "grown")
    async with serve("llama", tmp_path, adapters=["grown"]) as harness:
        force = SamplingParams(temperature=0.0, logit_bias={END: 100.0})
        for minimum, count in ((0, 1), (4, 5)):
            stop = StopConditions(max_tokens=9, min_tokens=minimum)
            request = await own_request(harness, [65], "grown", sampling=force, stop=stop)
            answer = await harness.run(request)
            assert len(answer.token_ids) == count
            assert answer.finish.stop == END
            assert "<|end|>" not in answer.text


async def test_an_adapter_with_its_own_vocabulary_must_be_alone_at_weight_one(
    tmp_path: Path,
) -> None:
    model = twin("llama").model
    for name in ("one", "two"):
        save_grown(model, make_config("lora", **Q), tmp_path / name)
    async with serve("llama", tmp_path, adapters=["one", "two"]) as harness:
        for mix in (["one", "two"], [("one", 0.5)], [("one", 0.0)]):
            with pytest.raises(InvalidRequestError, check=says("VOCABULARY_NOT_ALONE")):
                await harness.run(await own_request(harness, [65], *mix))


async def test_added_tokens_do_not_combine_with_parts_of_the_base(tmp_path: Path) -> None:
    """Otherwise, an adapter with other tokens would find the blocks before an invocation."""
    model = twin("llama").model
    invoked = make_config("alora", **Q, alora_invocation_tokens=[65])
    save_grown(model, make_config("lora", **Q), tmp_path / "grown")
    save_adapter(model, invoked, tmp_path / "invoked", seed=1)
    async with serve("llama", tmp_path, adapters=["grown", "invoked"]) as harness:
        with pytest.raises(InvalidRequestError, check=says("VOCABULARY_WITH_PARTIAL")):
            await harness.run(await own_request(harness, [FIRST, 65], "grown", "invoked"))
        assert (await harness.run(make_request([70, 65], "invoked"))).token_ids


@pytest.mark.long
@pytest.mark.usefixtures("coarse_tiles")
async def test_the_gpu_path_serves_added_tokens(tmp_path: Path) -> None:
    names = ("saved", "tokens")
    oracles = {}
    for name in names:
        method, keys = VARIANTS[name]
        config = make_config(method, **keys)
        oracles[name] = save_grown(twin("llama").model, config, tmp_path / name)
    async with serve("llama", tmp_path, adapters=names, gpu=True, max_num_seqs=8) as harness:
        requests = []
        for name in names:
            for prompt in (prompt_with(9, 1), [FIRST]):
                requests.append(await own_request(harness, prompt, name, max_tokens=4))
                requests.append(await own_request(harness, prompt, name, score=True))
                requests.append(make_request(prompt_of(5), max_tokens=4))
        together = await harness.run_together_and_alone(requests)
        for request, answer in zip(requests, together, strict=True):
            if request.adapters:
                check = check_score if request.score else check_greedy
                name = request.adapters[0].name
                check(answer, oracles[name], list(request.prompt_token_ids), name)
