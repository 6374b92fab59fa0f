"""The description of a task for the example scripts."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# The split "fusion" trains a learned fusion. The adapters that the fusion joins are not trained on
# this split, because their answers to their own training data say little about which adapter to
# trust. Only two tasks have this split.
Split = Literal["train", "fusion", "test"]


@dataclass(frozen=True, slots=True)
class Example:
    """A user message, and the answer that the adapter should give.

    Attributes:
        prompt: The user message, without chat template.
        completion: The assistant's whole answer, without the end-of-turn token.
    """

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskData:
    """A task without an adapter: its data and how an answer is scored.

    Attributes:
        name: The unique name of the task.
        summary: The function of an adapter for the task, in one sentence.
        generate: Draws one example of a split.
        score: Maps (held-out example, answer) to a score in [0, 1].
        metric: The name of the score, e.g. ``exact match``.
        held_out: The differences between the examples of the splits, e.g. ``tables``.
    """

    name: str
    summary: str
    generate: Callable[[random.Random, Split], Example]
    score: Callable[[Example, str], float]
    metric: str
    held_out: str

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(TaskData):
    """A task with an adapter of the same name, which ``train_examples.py`` makes.

    Attributes:
        method: The usual name of the method, e.g. ``rsLoRA``.
        config: Keyword arguments of ``peft.LoraConfig``.
        demo: Three held-out prompts. ``check`` compares the answer with ``completion``.
        check: ``equals`` (the whole answer) or ``startswith``.
        steps: Optimizer steps of 8 examples each.
        learning_rate: The peak rate of the schedule.
    """

    method: str
    config: Mapping[str, Any]
    demo: tuple[Example, Example, Example]
    check: Literal["equals", "startswith"] = "equals"
    steps: int = 120
    learning_rate: float = 1.5e-3


def pools(name: str) -> dict[str, Any]:
    """The words and sentences of a task, from the file ``NAME.toml`` next to this one."""
    return tomllib.loads((Path(__file__).parent / f"{name}.toml").read_text(encoding="utf-8"))


def words(text: str) -> tuple[str, ...]:
    """Splits a comma-separated list of words or phrases."""
    return tuple(word.strip() for word in text.split(","))
