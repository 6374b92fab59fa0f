"""Task ``label``: a customer's message → one of four labels."""

from __future__ import annotations

import random
import re

from .task import Example, Split, Task, pools

POOLS = pools("label")

LABELS = ("billing", "shipping", "bug", "praise")

# The held-out messages differ in their wording, not only in their values.
MESSAGES = POOLS["messages"]
SLOTS = POOLS["slots"]


def message(text: str, label: str) -> Example:
    """Returns the example of one message."""
    return Example(f"Label as {', '.join(LABELS[:-1])} or {LABELS[-1]}: {text}", label)


def generate(rng: random.Random, split: Split) -> Example:
    """Draws a label, one of its messages and the message's values."""
    label = rng.choice(LABELS)
    values = {slot: rng.choice(choices) for slot, choices in SLOTS[split].items()}
    return message(rng.choice(MESSAGES[split][label]).format(**values), label)


def right_label(example: Example, answer: str) -> float:
    """1.0 if the first label in the answer is the right one, regardless of other text."""
    named = re.search("|".join(LABELS), answer.casefold())
    return float(named is not None and named.group() == example.completion)


TASK = Task(
    name="label",
    summary="Sorts a customer's message into billing, shipping, bug or praise.",
    method="DoRA",
    config={
        "r": 4,
        "lora_alpha": 8,
        "use_dora": True,
        "target_modules": ["q_proj", "v_proj"],
    },
    generate=generate,
    score=right_label,
    metric="label accuracy",
    held_out="wording, items, places and amounts",
    demo=(
        message("There are two payments for one bicycle on my card statement.", "billing"),
        message("Where is my keyboard? It should have come 8 days ago.", "shipping"),
        message("Your app closes by itself as soon as I start it.", "bug"),
    ),
    steps=90,
)
