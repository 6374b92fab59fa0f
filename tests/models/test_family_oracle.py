"""Families that differ from Llama, compared with transformers and PEFT in mixed batches.

The reference has the weights that turret serves. Prompts end before and after windows (24), the
length from which queries grow (40), the switch of LongRoPE (64), blocks (16) and attention tiles
(128).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import MIXTURES, OTHER_ARCHITECTURES
from builders.methods import make_config, save_adapter
from method_oracle import (
    Twin,
    check_batch,
    check_bfloat16,
    check_effect,
    check_greedy,
    check_score,
    oracle_of,
    prompt_of,
    serve,
    twin,
)
from servers.engine_harness import EngineHarness, make_request
from servers.gpu_serving import gpu_serving

from turret.kernels import cpu as native
from turret.kernels.rows import forget_choices
from turret.server.engine.scheduling.request import FinishReason, StopConditions

EVERY = {"target_modules": "all-linear"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# Name → method and changes to its config.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {**EVERY, "rank_pattern": {r"layers\.1\..*": 7}, "lora_bias": True}),
    "regex": ("rslora", {"target_modules": r".*\.layers\.1\..*(o_proj|down_proj|output_linear)"}),
    "dora": ("dora", EVERY),
    "loha": ("loha", EVERY),
    "prompt": ("prompt_tuning", {"num_virtual_tokens": 3}),
    "rows": ("trainable_tokens", {"token_indices": list(range(0, 250, 3))}),
}
# Lengths of prompts; each is sent with the base and every adapter in turn.
LENGTHS = (140, 17, 60, 1, 26, 90, 33)
MAX_TOKENS = 4


def some(few: Sequence[str]) -> list[Any]:
    """All architectures; those outside of ``few`` only in long runs."""
    return [
        name if name in few else pytest.param(name, marks=pytest.mark.long)
        for name in OTHER_ARCHITECTURES
    ]


def adapters_of(architecture: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """On experts, PEFT supports only plain LoRA; "all-linear" includes experts."""
    if architecture not in MIXTURES:
        return ADAPTERS
    rank = {r".*\.layers\.1\.self_attn\..*": 7}
    return {
        **ADAPTERS,
        "lora": ("lora", {**EVERY, "rank_pattern": rank}),
        "dora": ("dora", {"target_modules": [*ATTENTION, "lm_head"]}),
    }


def save_adapters(architecture: str, root: Path, names: Iterable[str] = ADAPTERS) -> None:
    for seed, name in enumerate(names):
        method, changes = adapters_of(architecture)[name]
        config = make_config(method, **changes)
        save_adapter(twin(architecture).model, config, root / name, seed=seed)


def asked() -> list[tuple[str | None, list[int], bool]]:
    """Adapters, prompts, and whether each is scored or answered."""
    return [
        (name, prompt_of(LENGTHS[(number + 3 * score) % len(LENGTHS)], number), score)
        for number, name in enumerate((None, *ADAPTERS))
        for score in (True, False)
    ]


async def answered(base: Twin, root: Path, dtype: str) -> list[tuple[str | None, list[int], Any]]:
    """Adapters, prompts, and answers in one batch.

    Each request must have the same bits when it runs alone.
    """
    requests = [
        make_request(prompt, name, score=score, max_tokens=MAX_TOKENS)
        for name, prompt, score in asked()
    ]
    async with serve(base, root, dtype=dtype, adapters=list(ADAPTERS)) as harness:
        answers = await harness.run_together_and_alone(requests)
    return [(name, p, answer) for (name, p, _), answer in zip(asked(), answers, strict=True)]


@pytest.mark.parametrize("architecture", OTHER_ARCHITECTURES)
async def test_every_method_in_one_batch_equals_peft(architecture: str, tmp_path: Path) -> None:
    base = twin(architecture)
    save_adapters(architecture, tmp_path)
    oracles = {name: oracle_of(base.model, tmp_path, name) for name in (None, *ADAPTERS)}
    for name in ADAPTERS:
        check_effect(oracles[name], base.model, prompt_of(40), name, least=0.02)
    for name, prompt, answer in await answered(base, tmp_path, "float32"):
        check = check_greedy if answer.token_ids else check_score
        check(answer, oracles[name], prompt, f"{architecture} {name} {len(prompt)}")


async def test_a_longrope_request_keeps_its_frequencies(tmp_path: Path) -> None:
    """The prompt and ``max_tokens`` determine the frequencies; the two kinds share no blocks."""
    prompt = prompt_of(50)
    short, long = make_request(prompt, max_tokens=14), make_request(prompt, max_tokens=15)
    unbounded = replace(short, request_id="u", stop=StopConditions(ignore_eos=True))
    answers = []
    for order in ((short, long, unbounded), (long, short)):
        async with serve("phi3", tmp_path, dtype="bfloat16") as harness:
            answers.append({r.stop.max_tokens: await harness.run(r) for r in order})
    assert answers[0][14].bits == answers[1][14].bits
    assert answers[0][15].bits == answers[1][15].bits
    assert answers[0][15].logprobs[0] != answers[0][14].logprobs[0]
    # Without max_tokens, a request begins with the short frequencies, and ends at the switch.
    assert answers[0][None].bits == answers[0][14].bits
    assert answers[0][None].finish.reason == FinishReason.LENGTH


@pytest.fixture
def no_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TURRET_NATIVE", "0")
    native.library.cache_clear()
    forget_choices()
    yield
    monkeypatch.undo()
    native.library.cache_clear()
    forget_choices()


async def check_few(architecture: str, root: Path, *, gpu: bool) -> None:
    """Check the base and two adapters in one batch, to the end of a window and past a switch."""
    base = twin(architecture)
    # On experts, PEFT supports only plain LoRA.
    names = ["lora" if architecture in MIXTURES else "dora", "loha"]
    save_adapters(architecture, root, names)
    start = gpu_serving if gpu else EngineHarness.start
    async with start(base.folder, root, adapters=names) as harness:
        asked = [(n, prompt_of(k, k)) for n, k in zip((None, *names), (70, 30, 5), strict=True)]
        await check_batch(harness, base.model, root, asked)


@pytest.mark.usefixtures("no_compiled_kernels")
@pytest.mark.parametrize("architecture", some(("gemma2", "glm4", "ministral3", "olmo2", "phi3")))
async def test_the_torch_path_equals_peft(architecture: str, tmp_path: Path) -> None:
    await check_few(architecture, tmp_path, gpu=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter needs CPU tensors")
@pytest.mark.long
@pytest.mark.parametrize("architecture", OTHER_ARCHITECTURES)
async def test_the_gpu_path_equals_peft(architecture: str, tmp_path: Path) -> None:
    await check_few(architecture, tmp_path, gpu=True)


@pytest.mark.parametrize(
    "architecture", some(("gemma2", "gemma3_text", "granite", "olmo2", "phi3"))
)
async def test_bfloat16_is_as_exact_as_peft(architecture: str, tmp_path: Path) -> None:
    """The total error is within 1.3 times that of transformers and PEFT in bfloat16."""
    exact = twin(architecture, torch.bfloat16)
    save_adapters(architecture, tmp_path)
    check_bfloat16(await answered(exact, tmp_path, "bfloat16"), exact.model, tmp_path)
