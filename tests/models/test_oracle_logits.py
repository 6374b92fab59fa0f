"""Logits and greedy tokens, compared with transformers and PEFT on the served weights.

The reference is transformers' model in fp32 with turret's dequantised weights in the decoder's
linear modules, and the adapter that PEFT reads from the same directory. A mix is summed in output
space: ``base(x) + Σ w_k (adapted_k(x) − base(x))`` per linear module.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import (
    ARCHITECTURES,
    VOCAB_SIZE,
    load_oracle,
    save_tiny_model,
    served_weights,
)
from builders.methods import save_adapter
from checkout import ROOT
from peft import LoraConfig, PeftModel
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters.adapter import AdapterRef

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXAMPLES = ROOT / "examples" / "adapters"
# The lengths cross the attention tile (128), the block (16) and the mistral window (24).
PROMPT_LENGTHS = (1, 17, 140)
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": ALL},
    "qv": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 6, "lora_alpha": 4, "target_modules": ALL, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "use_dora": True},
    "dora_rslora": {
        "r": 5,
        "lora_alpha": 3,
        "target_modules": ["k_proj", "down_proj"],
        "use_dora": True,
        "use_rslora": True,
    },
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"v_proj": 20, r".*\.0\.self_attn\.q_proj": 1},
    },
    "bias": {"r": 4, "lora_alpha": 10, "target_modules": ALL, "lora_bias": True},
}


@dataclass(frozen=True)
class Subject:
    """A model directory (None: the bundled model) and the adapters alongside it."""

    model: Path | None
    root: Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """Returns tiny models with all adapters of ``CONFIGS``, each created once."""
    made: dict[str, Subject] = {}

    def make(architecture: str) -> Subject:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            model = save_tiny_model(architecture, folder / "model")
            oracle = oracle_of(model, torch.float32)
            for seed, (name, config) in enumerate(CONFIGS.items()):
                lora = LoraConfig(task_type="CAUSAL_LM", **config)
                save_adapter(oracle, lora, folder / "adapters" / name, seed=seed)
            made[architecture] = Subject(model, folder / "adapters")
        return made[architecture]

    return make


def oracle_of(model: Path | None, served_dtype: torch.dtype) -> Any:
    return load_oracle(model, served_weights(model, served_dtype))


def with_peft(oracle: Any, folder: Path) -> Any:
    """A copy of the reference with an adapter loaded by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(oracle), str(folder)).eval()


def with_mix(oracle: Any, root: Path, mix: Sequence[AdapterRef]) -> Any:
    """A copy of the reference in which linear modules add the mix's changes in output space."""
    mixed = copy.deepcopy(oracle)
    adapted = [(ref.weight, with_peft(oracle, root / ref.name).base_model.model) for ref in mix]
    for name, module in mixed.named_modules():
        if not isinstance(module, torch.nn.Linear) or ".layers." not in name:
            continue
        others = [(weight, other.get_submodule(name)) for weight, other in adapted]

        def add(
            _: Any, inputs: tuple[torch.Tensor], output: torch.Tensor, others: Any = others
        ) -> torch.Tensor:
            return output + sum(w * (other(inputs[0]) - output) for w, other in others)

        module.register_forward_hook(add)
    return mixed


def prompts(vocab_size: int = VOCAB_SIZE, lengths: Sequence[int] = PROMPT_LENGTHS) -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def prompt_logprobs(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    """The logprob of every prompt token but the first, in fp32."""
    logits = model(input_ids=torch.tensor([prompt])).logits[0].float()
    rows = logits[:-1].log_softmax(-1)
    return rows.gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1)


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens with their logprobs, without a cache."""
    tokens, logprobs = list(prompt), []
    for _ in range(count):
        row = model(input_ids=torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
        tokens.append(int(row.argmax()))
        logprobs.append(float(row.max()))
    return tokens[len(prompt) :], logprobs


def serving(subject: Subject) -> AbstractAsyncContextManager[EngineHarness]:
    """An engine in fp32 with all adapters."""
    return EngineHarness.start(subject.model, subject.root, dtype="float32", adapters=list(CONFIGS))


async def assert_equals_oracle(
    harness: EngineHarness, mix: Sequence[AdapterRef], oracle: Any
) -> None:
    """Compare scores and greedy answers in fp32, within 1e-4."""
    for prompt in prompts():
        score = await harness.run(make_request(prompt, *mix, score=True))
        assert score.prompt_logprobs[0] is None
        found = torch.tensor([p for p in score.prompt_logprobs[1:] if p is not None])
        expected = prompt_logprobs(oracle, prompt)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=str(mix))
        answer = await harness.run(make_request(prompt, *mix, max_tokens=8))
        tokens, logprobs = greedy(oracle, prompt, 8)
        assert list(answer.token_ids) == tokens, mix
        assert answer.logprobs == pytest.approx(logprobs, rel=1e-4, abs=1e-4), mix


def moves(oracle: Any, other: Any) -> float:
    """The distance between two models, so that tests detect an adapter without an effect."""
    prompt = prompts()[-1]
    return float((prompt_logprobs(oracle, prompt) - prompt_logprobs(other, prompt)).abs().mean())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_base_and_adapters_equal_transformers_and_peft(tiny: Any, architecture: str) -> None:
    subject = tiny(architecture)
    base = oracle_of(subject.model, torch.float32)
    async with serving(subject) as harness:
        await assert_equals_oracle(harness, (), base)
        for name in CONFIGS:
            oracle = with_peft(base, subject.root / name)
            assert moves(base, oracle) > 0.05, name
            await assert_equals_oracle(harness, [AdapterRef(name=name)], oracle)


MIXES: list[dict[str, float]] = [
    {"lora": 0.5},
    {"dora": -0.6},
    {"lora": 1.0, "rslora": 1.0},
    {"dora": 0.7, "dora_rslora": 0.4, "bias": -0.3, "patterns": 0.25},
    {"lora": 0.0, "bias": 1.5},
]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
async def test_a_mix_is_the_weighted_sum_of_deltas(tiny: Any, architecture: str) -> None:
    subject = tiny(architecture)
    base = oracle_of(subject.model, torch.float32)
    async with serving(subject) as harness:
        for weights in MIXES:
            mix = [AdapterRef(name=name, weight=weight) for name, weight in weights.items()]
            oracle = with_mix(base, subject.root, mix)
            assert moves(base, oracle) > 0.05, weights
            await assert_equals_oracle(harness, mix, oracle)


def test_the_mix_oracle_of_one_adapter_matches_peft(tiny: Any) -> None:
    subject = tiny("qwen2")
    base = oracle_of(subject.model, torch.float32)
    for name in CONFIGS:
        mixed = with_mix(base, subject.root, [AdapterRef(name=name)])
        assert moves(mixed, with_peft(base, subject.root / name)) < 1e-5


async def errors_in_bfloat16(
    subject: Subject, names: Sequence[str], asked: Sequence[Sequence[int]]
) -> list[tuple[str, float, float]]:
    """The mean |Δlogprob| from fp32 of turret and of PEFT in bf16, per adapter ("" is the base)."""
    base = oracle_of(subject.model, torch.bfloat16)
    half = copy.deepcopy(base).to(torch.bfloat16)
    loaded = [name for name in names if name]
    found = []
    async with EngineHarness.start(
        subject.model, subject.root, dtype="bfloat16", adapters=loaded
    ) as harness:
        for name in names:
            exact = with_peft(base, subject.root / name) if name else base
            peer = with_peft(half, subject.root / name) if name else half
            ours, theirs = [], []
            for prompt in asked:
                expected = prompt_logprobs(exact, prompt)
                refs = [name] if name else []
                answer = await harness.run(make_request(prompt, *refs, score=True))
                mine = torch.tensor([p for p in answer.prompt_logprobs[1:] if p is not None])
                ours.append((mine - expected).abs())
                theirs.append((prompt_logprobs(peer, prompt) - expected).abs())
            found.append((name, float(torch.cat(ours).mean()), float(torch.cat(theirs).mean())))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_bfloat16_is_as_exact_as_peft(tiny: Any, architecture: str) -> None:
    subject = tiny(architecture)
    asked = prompts(lengths=(60, 150, 200, 97))
    for name, ours, theirs in await errors_in_bfloat16(subject, ["", *CONFIGS], asked):
        assert math.isfinite(ours)
        assert theirs > 0
        assert ours <= 1.3 * theirs, (architecture, name, ours, theirs)


@pytest.mark.long
async def test_the_example_adapters_are_as_exact_as_peft_in_bfloat16() -> None:
    # The adapters that change modules; other tests cover soft prompts and prefixes.
    names = sorted(
        path.parent.name
        for path in EXAMPLES.glob("*/adapter_config.json")
        if "target_modules" in json.loads(path.read_text())
    )
    assert len(names) >= 8
    subject = Subject(None, EXAMPLES)
    text = "The quick brown fox jumps over the lazy dog. SELECT name FROM users WHERE age > 30;"
    async with EngineHarness.start(None, None) as harness:
        encode = harness.tokenizer.encode
        asked = [encode(text), encode((EXAMPLES.parent / "README.md").read_text())[:96]]
    for name, ours, theirs in await errors_in_bfloat16(subject, ["", *names], asked):
        assert ours <= 1.3 * theirs, (name, ours, theirs)
