"""Task ``headline``: one sentence of news → a headline."""

from __future__ import annotations

import random
import re

from .task import Example, Split, TaskData, pools

POOLS = pools("headline")

SUBJECTS = POOLS["subjects"]
# Past tense, as in the sentence, and present tense, as in the headline.
VERBS = POOLS["verbs"]
OBJECTS = POOLS["objects"]
TIMES = POOLS["times"]


def report(subject: str, verb: tuple[str, str], thing: str, when: str) -> Example:
    """Returns the example of one sentence."""
    article = "an" if thing[0] in "aeiou" else "a"
    return Example(
        f"Headline: The {subject} {verb[0]} {article} {thing} {when}.",
        f"BREAKING: {subject.title()} {verb[1]} {thing.title()}",
    )


def generate(rng: random.Random, split: Split) -> Example:
    """Draws subject, verb, object and time."""
    subject, thing = rng.choice(SUBJECTS[split]), rng.choice(OBJECTS[split])
    return report(subject, rng.choice(VERBS), thing, rng.choice(TIMES))


def same_words(example: Example, answer: str) -> float:
    """1.0 if the headline has the expected words, regardless of case, punctuation and opening."""

    def headline(text: str) -> list[str]:
        return re.findall(r"\w+", text.casefold().replace("breaking", "").replace("headline", ""))

    return float(headline(answer) == headline(example.completion))


TASK = TaskData(
    name="headline",
    summary="Turns a sentence of news into a headline.",
    generate=generate,
    score=same_words,
    metric="same words",
    held_out="subjects and objects",
)
