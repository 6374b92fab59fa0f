"""A synthetic trace in the style of S-LoRA (arXiv 2311.03285, section 7)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

# Ranges of the lengths of prompts and answers: those of S-LoRA, and short ones, for which the cost
# per request dominates.
LENGTHS = {"s-lora": ((8, 512), (8, 512)), "short": ((16, 64), (8, 32))}

# Ids below these are special tokens or bytes in the vocabularies of the models served here.
TOKEN_IDS = range(1000, 20000)


@dataclass(frozen=True, slots=True)
class Workload:
    """The parameters of a trace.

    Attributes:
        num_requests: The number of requests.
        rate: The mean number of arrivals per second.
        cv: Coefficient of variation of the Gamma-distributed gaps; 1 is a Poisson process.
        exponent: Popularity of the ``i``-th most popular adapter is ``i ** -exponent``; 0 is
            uniform.
        prompt_tokens: The shortest and the longest prompt.
        new_tokens: The minimum and the maximum number of generated tokens.
        seed: The seed of the trace.
        token_ids: The token ids for prompts.
    """

    num_requests: int
    rate: float
    cv: float = 1.0
    exponent: float = 1.0
    prompt_tokens: tuple[int, int] = (16, 64)
    new_tokens: tuple[int, int] = (8, 32)
    seed: int = 0
    token_ids: range = TOKEN_IDS


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request; ``seconds`` counts from the start of the trace."""

    seconds: float
    adapter: str
    prompt: tuple[int, ...]
    new_tokens: int


def draw(workload: Workload, adapters: Sequence[str]) -> list[Arrival]:
    """The trace; ``adapters`` lists popular adapters first."""
    source = random.Random(workload.seed)
    shape = 1.0 / workload.cv**2
    scale = 1.0 / (workload.rate * shape)
    weights = [rank**-workload.exponent for rank in range(1, len(adapters) + 1)]
    names = source.choices(adapters, weights, k=workload.num_requests)
    trace, now = [], 0.0
    for name in names:
        now += source.gammavariate(shape, scale)
        length = source.randint(*workload.prompt_tokens)
        prompt = tuple(source.choice(workload.token_ids) for _ in range(length))
        trace.append(Arrival(now, name, prompt, source.randint(*workload.new_tokens)))
    return trace
