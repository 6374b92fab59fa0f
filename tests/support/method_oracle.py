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
from servers.engine_harness import Answer, EngineHarness, make_request

from turret.server.adapters.adapter import AdapterRef

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


def check_score(answer: Answer, model: Any, prompt: list[int], what: str) -> None:
    """Compare a scored prompt with the reference."""
    rows = oracle_logprobs(model, prompt)
    expected = [float(rows[i, token]) for i, token in enumerate(prompt[1:])]
    assert answer.prompt_logprobs[0] is None
    check_close([p for p in answer.prompt_logprobs[1:] if p is not None], expected, what)


def check_greedy(answer: Answer, model: Any, prompt: list[int], what: str) -> None:
    """Compare a greedy answer with the reference."""
    tokens, logprobs = oracle_greedy(model, prompt, len(answer.token_ids))
    assert list(answer.token_ids) == tokens, what
    check_close([p for p in answer.logprobs if p is not None], logprobs, what)


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
        places = torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])
        models = (load_adapter(m, root / name) if name else m for m in (model, half))
        expected, rough = (oracle_logprobs(m, prompt)[:-1].float()[places] for m in models)
        found = torch.tensor([p for p in answer.prompt_logprobs[1:] if p is not None])
        ours.append((found - expected).abs())
        theirs.append((rough - expected).abs())
    bound = 1.3 * float(torch.cat(theirs).mean())
    assert bound > 0
    assert float(torch.cat(ours).mean()) <= bound


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
    found: list[float] = []
    expected: list[float] = []
    theirs: list[float] = []
    async with EngineHarness.start(
        base.folder, root, dtype="bfloat16", adapters=adapters
    ) as harness:
        for seed in range(num_prompts):
            prompt = prompt_of(60, seed)
            answer = await harness.run(make_request(prompt, adapters[-1], score=True))
            found += [p for p in answer.prompt_logprobs[1:] if p is not None]
            for model, logprobs in ((exact, expected), (rounded, theirs)):
                rows = oracle_logprobs(model, prompt).float()
                logprobs += [float(rows[i, token]) for i, token in enumerate(prompt[1:])]
    served, plain = (
        (torch.tensor(some) - torch.tensor(expected)).abs().mean() for some in (found, theirs)
    )
    assert 0 < served <= 1.3 * plain


async def check_oracles(
    base: Twin,
    root: Path,
    adapters: Sequence[str],
    oracles: Iterable[tuple[AdapterRef | str, Any]],
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
    plain = oracle_logprobs(base.model, prompts[0])
    async with EngineHarness.start(
        base.folder, root, adapters=adapters, max_num_batched_tokens=24, max_num_seqs=8
    ) as harness:
        for prompt in prompts:
            check_score(await harness.run(make_request(prompt, score=True)), base.model, prompt, "")
        for asked, oracle in oracles:
            # An adapter without effect would pass every comparison.
            assert (oracle_logprobs(oracle, prompts[0]) - plain).abs().max() > 0.05, asked
            for prompt in prompts:
                scored = await harness.run(make_request(prompt, asked, score=True))
                check_score(scored, oracle, prompt, f"{asked}: score of {len(prompt)}")
                answer = await harness.run(make_request(prompt, asked, max_tokens=MAX_TOKENS))
                check_greedy(answer, oracle, prompt, f"{asked}: greedy after {len(prompt)}")
                assert answer.finish.usage.prompt_tokens == len(prompt)


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
