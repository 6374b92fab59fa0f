"""Task ``sentiment``: a review → positive or negative."""

from __future__ import annotations

import random
import re

from .task import Example, Split, TaskData, pools

POOLS = pools("sentiment")

# Sentences of reviews; the held-out ones differ in wording and topics.
OPINIONS = POOLS["opinions"]
THINGS = POOLS["things"]


def review(text: str, label: str) -> Example:
    """Returns the example of one review."""
    return Example(f"Review: {text} Sentiment?", label)


def generate(rng: random.Random, split: Split) -> Example:
    """Draws a sentiment, one of its sentences and a thing."""
    label = rng.choice(("positive", "negative"))
    text = rng.choice(OPINIONS[split][label])
    return review(text.format(thing=rng.choice(THINGS[split])), label)


def right_sentiment(example: Example, answer: str) -> float:
    """1.0 if the first sentiment in the answer is the right one."""
    named = re.search("positive|negative", answer.casefold())
    return float(named is not None and named.group() == example.completion)


TASK = TaskData(
    name="sentiment",
    summary="Tells whether a review is positive or negative.",
    generate=generate,
    score=right_sentiment,
    metric="label accuracy",
    held_out="wording and things",
)
