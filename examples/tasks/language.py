"""Task ``language``: a sentence → its language."""

from __future__ import annotations

import random
import re

from .task import Example, Split, TaskData, pools

POOLS = pools("language")

LANGUAGES = ("English", "German", "French", "Spanish")
# Split → language → subjects or predicates; the splits share none of them.
SUBJECTS = POOLS["subjects"]
ACTIONS = POOLS["actions"]


def sentence(text: str, language: str) -> Example:
    """Returns the example of one sentence."""
    return Example(f"Which language is this? {text}", language)


def generate(rng: random.Random, split: Split) -> Example:
    """Draws a language, a subject and a predicate."""
    language = rng.choice(LANGUAGES)
    who, what = rng.choice(SUBJECTS[split][language]), rng.choice(ACTIONS[split][language])
    return sentence(f"{who} {what}.", language)


def only_language(example: Example, answer: str) -> float:
    """1.0 if the first language in the answer is the right one."""
    named = re.search("|".join(LANGUAGES), answer)
    return float(named is not None and named.group() == example.completion)


TASK = TaskData(
    name="language",
    summary="Names the language of a sentence: English, German, French or Spanish.",
    generate=generate,
    score=only_language,
    metric="label accuracy",
    held_out="subjects and predicates",
)
