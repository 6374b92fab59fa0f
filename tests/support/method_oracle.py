"""Compares the engine with PEFT's forward pass, on a model with the served weights."""

from __future__ import annotations

import atexit
import copy
import functools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from builders.bases.tiny_models import VOCAB_SIZE, load_oracle, save_tiny_model, served_weights
from builders.methods import load_adapter, make_config, quiet, save_adapter
from servers.engine_harness import Answer, Asked, EngineHarness, make_request

# Tolerance of a log probability; relative if its size is larger than 1.
TOLERANCE = 1e-4
MAX_TOKENS = 8
# A prompt longer than a step, one shorter than the limit of a short chunk, and one of one token.
LENGTHS = (37, 6, 1)


@dataclass(frozen=True, slots=True)
class Twin:
    """A tiny checkpoint, and transformers' fp32 model with the weights that turret serves."""

    folder: Path
    model: Any


@functools.cache
def twin(architecture: str, served_dtype: torch.dtype = torch.float32) -> Twin:
    """The twin of an architecture and dtype, built once per test run."""
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    folder = save_tiny_model(architecture, Path(directory.name) / architecture)
    return Twin(folder, load_oracle(folder, served_weights(folder, served_dtype)))


def serve(
    base: Twin | str, *given: Any, **options: Any
) -> AbstractAsyncContextManager[EngineHarness]:
    """An engine on a twin, or on that of an architecture; see ``EngineHarness.start``."""
    served = twin(base) if isinstance(base, str) else base
    return EngineHarness.start(served.folder, *given, **options)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random text, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE - 2, (length,), generator=generator).tolist()


@torch.no_grad()
def oracle_logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """Log-softmax after each token of a text, ``[tokens, vocab]``; soft tokens are cut off."""
    # PEFT passes a prefix under a name that transformers has deprecated.
    with quiet():
        logits = model(input_ids=torch.tensor([tokens])).logits[0, -len(tokens) :]
    return logits.log_softmax(-1)


@torch.no_grad()
def oracle_greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log probabilities, each computed by a full forward pass."""
    tokens, logprobs = list(prompt), []
    for _ in range(count):
        row = oracle_logprobs(model, tokens)[-1]
        tokens.append(int(row.argmax()))
        logprobs.append(float(row.max()))
    return tokens[len(prompt) :], logprobs


def check_close(found: list[float], expected: list[float], what: str) -> None:
    assert len(found) == len(expected), what
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert abs(one - other) <= TOLERANCE * max(1.0, abs(other)), (what, i, one, other)


def prompt_scores(model: Any, prompt: list[int]) -> torch.Tensor:
    """The log probabilities of all tokens of a prompt but the first, fp32."""
    places = torch.arange(len(prompt) - 1), torch.tensor(prompt[1:], dtype=torch.long)
    return oracle_logprobs(model, prompt)[:-1].float()[places]


def found_scores(answer: Answer) -> torch.Tensor:
    return torch.tensor([p for p in answer.prompt_logprobs if p is not None])


def check_score(answer: Answer, model: Any, prompt: list[int], what: str) -> None:
    """Compare a scored prompt with the reference."""
    assert answer.prompt_logprobs[0] is None
    check_close(found_scores(answer).tolist(), prompt_scores(model, prompt).tolist(), what)


def check_greedy(answer: Answer, model: Any, prompt: list[int], what: str) -> None:
    """Compare a greedy answer with the reference."""
    tokens, logprobs = oracle_greedy(model, prompt, len(answer.token_ids))
    assert list(answer.token_ids) == tokens, what
    check_close([p for p in answer.logprobs if p is not None], logprobs, what)


def oracle_of(model: Any, root: Path, name: str | None) -> Any:
    """The reference for an adapter, or for the base."""
    return load_adapter(model, root / name) if name else model


def check_effect(
    oracle: Any, model: Any, prompt: list[int], what: str, least: float = 0.05
) -> None:
    """Check that an adapter has an effect; without one, it would pass every comparison."""
    change = oracle_logprobs(oracle, prompt) - oracle_logprobs(model, prompt)
    assert change.abs().max() > least, what


async def check_request(
    harness: EngineHarness, oracle: Any, prompt: list[int], *adapters: Asked, **changes: Any
) -> Answer:
    """Compare a scored prompt and a greedy answer with the reference; returns the answer."""
    what = f"{adapters} after {len(prompt)} tokens"
    scored = await harness.run(make_request(prompt, *adapters, score=True, **changes))
    check_score(scored, oracle, prompt, f"score of {what}")
    answer = await harness.run(make_request(prompt, *adapters, **changes))
    check_greedy(answer, oracle, prompt, f"answer of {what}")
    assert answer.finish.usage.prompt_tokens == len(prompt)
    return answer


async def check_batch(
    harness: EngineHarness,
    model: Any,
    root: Path,
    asked: Sequence[tuple[str | None, list[int]]],
    max_tokens: int = 3,
) -> list[Answer]:
    """Compare greedy answers in one batch, each with the reference for its adapter."""
    requests = [make_request(prompt, name, max_tokens=max_tokens) for name, prompt in asked]
    answers = await harness.run_all(requests)
    for (name, prompt), answer in zip(asked, answers, strict=True):
        check_greedy(answer, oracle_of(model, root, name), prompt, f"{name}")
    return answers


class SumOfChanges(torch.nn.Module):
    """``base(x) + Σ w (adapted(x) − base(x))`` for one module of several PEFT models."""

    def __init__(self, base: Any, parts: list[tuple[Any, float, dict[str, Any]]]) -> None:
        super().__init__()
        self._base, self._parts = base, parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = self._base(x)
        # Some of PEFT's modules change their input in place.
        return plain + sum(w * (part(x.clone(), **told) - plain) for part, w, told in self._parts)


def mixed_oracle(
    model: Any, root: Path, mix: Sequence[tuple[str, float]], **told: dict[str, Any]
) -> Any:
    """A copy of a model whose modules sum the changes of PEFT's modules in output space.

    Args:
        model: transformers' model.
        root: The directory of the adapters.
        mix: The adapters and their weights.
        told: The keyword arguments of each call of an adapter's modules, by adapter.
    """
    mixed = copy.deepcopy(model)
    loaded = [(load_adapter(model, root / name), w, told.get(name, {})) for name, w in mix]
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        parts = [(m.get_submodule(f"base_model.model.{path}"), w, keys) for m, w, keys in loaded]
        changed = [part for part in parts if type(part[0]) is not type(module)]
        mixed.set_submodule(path, SumOfChanges(mixed.get_submodule(path), changed))
    return mixed.eval()


async def check_mixes(
    harness: EngineHarness, model: Any, root: Path, mixes: Iterable[Sequence[tuple[str, float]]]
) -> None:
    for mix in mixes:
        oracle = mixed_oracle(model, root, mix)
        if any(weight for _, weight in mix):
            check_effect(oracle, model, prompt_of(31), f"{mix}")
        await check_request(harness, oracle, prompt_of(31), *mix)


def check_within_peer(ours: list[torch.Tensor], theirs: list[torch.Tensor], what: str) -> None:
    """Check that turret's mean error is within 1.3 times that of its peer in bfloat16."""
    mine, peer = (float(torch.cat(errors).abs().mean()) for errors in (ours, theirs))
    assert 0 < mine <= 1.3 * peer, (what, mine, peer)


def check_bfloat16(
    answers: Sequence[tuple[str | None, list[int], Answer]], model: Any, root: Path
) -> None:
    """Check that the total error is within 1.3 times that of transformers and PEFT in bfloat16.

    Args:
        answers: Adapters, prompts and answers; only scored prompts count.
        model: transformers' model in float32, with the served weights.
        root: The directory of the adapters.
    """
    half = copy.deepcopy(model).to(torch.bfloat16)
    ours, theirs = [], []
    for name, prompt, answer in answers:
        if answer.token_ids or len(prompt) == 1:
            continue
        exact, rough = (prompt_scores(oracle_of(m, root, name), prompt) for m in (model, half))
        ours.append(found_scores(answer) - exact)
        theirs.append(rough - exact)
    check_within_peer(ours, theirs, "bfloat16")


async def check_rounding(
    base: Twin,
    root: Path,
    adapters: Sequence[str],
    exact: Any,
    rounded: Any,
    num_prompts: int = 8,
) -> None:
    """Check that the last adapter's error is within 1.3 times that of ``rounded``.

    Args:
        base: The base of the adapters, with the weights that are served in bfloat16.
        root: The directory of the adapters.
        adapters: The adapters to load, in order.
        exact: transformers' model in float32.
        rounded: The same in bfloat16.
        num_prompts: The number of scored prompts.
    """
    ours, theirs = [], []
    async with serve(base, root, dtype="bfloat16", adapters=adapters) as harness:
        for seed in range(num_prompts):
            prompt = prompt_of(60, seed)
            answer = await harness.run(make_request(prompt, adapters[-1], score=True))
            expected = prompt_scores(exact, prompt)
            ours.append(found_scores(answer) - expected)
            theirs.append(prompt_scores(rounded, prompt) - expected)
    check_within_peer(ours, theirs, adapters[-1])


async def check_oracles(
    base: Twin,
    root: Path,
    adapters: Sequence[str],
    oracles: Iterable[tuple[Asked, Any]],
    lengths: Sequence[int] = LENGTHS,
) -> None:
    """Serve adapters, and compare scores and greedy answers of some with reference models.

    The base is compared as well.

    Args:
        base: The base of the adapters.
        root: The directory of the adapters.
        adapters: The adapters to load, in order.
        oracles: The requested mixes, each with transformers' model.
        lengths: The lengths of the prompts.
    """
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths, 1)]
    async with serve(
        base, root, adapters=adapters, max_num_batched_tokens=24, max_num_seqs=8
    ) as harness:
        for prompt in prompts:
            check_score(await harness.run(make_request(prompt, score=True)), base.model, prompt, "")
        for asked, oracle in oracles:
            check_effect(oracle, base.model, prompts[0], f"{asked}")
            for prompt in prompts:
                await check_request(harness, oracle, prompt, asked)


async def check_methods(
    architecture: str,
    root: Path,
    variants: Mapping[str, tuple[str, dict[str, Any]]],
    lengths: Sequence[int] = LENGTHS,
) -> None:
    """Serve adapters, and compare scores and greedy answers with PEFT's forward pass.

    Args:
        architecture: The architecture of the base.
        root: An empty directory for the adapters.
        variants: Name → method and changes to its config.
        lengths: The lengths of the prompts.
    """
    base = twin(architecture)
    for seed, (name, (method, changes)) in enumerate(variants.items()):
        config = make_config(method, **changes)
        save_adapter(base.model, config, root / name, seed=seed)
    oracles = ((name, load_adapter(base.model, root / name)) for name in variants)
    await check_oracles(base, root, list(variants), oracles, lengths)
