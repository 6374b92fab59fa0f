"""Task ``sentiment``: a review → positive or negative."""

from __future__ import annotations

import random
import re

from .task import Example, Split, TaskData, words

# Sentences of reviews; the held-out ones differ in wording and topics.
OPINIONS: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": {
        "positive": (
            "I loved every minute of the {thing}.",
            "The {thing} was a pleasant surprise.",
            "What a charming {thing}, I will come back.",
            "The {thing} made me smile all evening.",
            "A brilliant {thing}, warmly recommended.",
            "The {thing} is worth every cent.",
            "I have never seen a better {thing}.",
            "My whole family enjoyed the {thing}.",
            "The {thing} was even better than they say.",
            "Such a beautiful and clever {thing}.",
            "The {thing} works perfectly and looks great.",
            "A wonderful {thing} from start to end.",
        ),
        "negative": (
            "The {thing} bored me to tears.",
            "What a waste of money this {thing} was.",
            "I regret that I ever tried the {thing}.",
            "The {thing} was dull and far too long.",
            "A terrible {thing}, stay away.",
            "The {thing} broke after two days.",
            "I have never seen a worse {thing}.",
            "The {thing} left everyone disappointed.",
            "The {thing} was ugly and badly made.",
            "I wanted my money back after the {thing}.",
            "The {thing} fell apart and nobody cared.",
            "An awful {thing} from start to end.",
        ),
    },
    "test": {
        "positive": (
            "The {thing} is fantastic, I am thrilled.",
            "We had a great time with the {thing}.",
            "This {thing} deserves all its praise.",
            "I would happily buy the {thing} again.",
            "Truly lovely, this {thing} won my heart.",
            "The {thing} exceeded my hopes.",
        ),
        "negative": (
            "The {thing} is horrible, I am furious.",
            "We were let down by the {thing}.",
            "This {thing} deserves no praise at all.",
            "I would never buy the {thing} again.",
            "Poor quality, this {thing} is useless.",
            "The {thing} was the biggest mistake of my year.",
        ),
    },
}
THINGS: dict[Split, tuple[str, ...]] = {
    "train": words(
        "film, novel, hotel, dinner, concert, vacuum cleaner, phone, museum, boat trip, jacket, "
        "coffee, course, play, restaurant, bike, headset, garden tour, cake, game, song"
    ),
    "test": words("comedy, poem, guest house, soup, exhibition, printer, train ride, backpack"),
}


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
