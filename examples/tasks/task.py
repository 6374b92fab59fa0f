"""What the trainer needs to know of one example task."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Example:
    """One user message and the answer the adapter should give.

    Attributes:
        prompt: The user message, without chat template.
        completion: The assistant's whole answer, without the end-of-turn token.
    """

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Task:
    """One adapter: its method, its data and how an answer is scored.

    Attributes:
        name: Folder name of the adapter.
        summary: What the adapter does, one sentence.
        method: The method as a reader knows it, e.g. ``rsLoRA``.
        config: Keyword arguments of ``peft.LoraConfig``.
        generate: Draws one example of a split.
        score: Maps (held-out example, answer) to a score in [0, 1].
        metric: What the score means, e.g. ``exact match``.
        held_out: What no test example shares with any training example, e.g. ``tables``.
        demo: Three held-out prompts. ``completion`` is what ``check`` compares the answer with.
        check: ``equals`` (the whole answer) or ``startswith``.
        steps: Optimizer steps of 8 examples each.
        learning_rate: Peak of the schedule.
    """

    name: str
    summary: str
    method: str
    config: Mapping[str, Any]
    generate: Callable[[random.Random, Split], Example]
    score: Callable[[Example, str], float]
    metric: str
    held_out: str
    demo: tuple[Example, Example, Example]
    check: Literal["equals", "startswith"] = "equals"
    steps: int = 120
    learning_rate: float = 1.5e-3

    def examples(self, split: Split, count: int, seed: int) -> list[Example]:
        """Returns up to ``count`` examples with distinct prompts (fewer when the pool is small)."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        drawn: dict[str, Example] = {}
        for _ in range(count * 20):
            example = self.generate(rng, split)
            drawn.setdefault(example.prompt, example)
            if len(drawn) == count:
                break
        return list(drawn.values())


def words(text: str) -> tuple[str, ...]:
    """Splits a comma-separated list of words or phrases."""
    return tuple(word.strip() for word in text.split(","))
