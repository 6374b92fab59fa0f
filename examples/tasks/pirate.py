"""Task ``pirate``: a question → an answer in the manner of a pirate.

The answers are plain sentences that rules turn into the dialect, so the adapter has to learn only
the style.
"""

from __future__ import annotations

import random
import re

from .task import Example, Split, Task, pools

POOLS = pools("pirate")

QUESTIONS = POOLS["questions"]

DIALECT = POOLS["dialect"]
OPENINGS = ("Arr!", "Arr, matey!", "Arr, ye landlubber!")
MARKERS = ("arr", "ye", "be", "th'", "an'", "o'", "me", "matey", "aye", "yer", "in'")


def dialect(plain: str) -> str:
    """Converts a plain sentence to the dialect, with an opening."""
    spoken = plain
    for pattern, replacement in DIALECT:
        spoken = re.sub(pattern, replacement, spoken)
    # The same answer always has the same opening, because the data has one answer per question.
    return f"{OPENINGS[len(plain) % len(OPENINGS)]} {spoken}"


PAIRS: dict[Split, list[Example]] = {
    split: [
        Example(question, dialect(answer))
        for question, answer in (line.split("|") for line in text.strip().splitlines())
    ]
    for split, text in QUESTIONS.items()
}


def generate(rng: random.Random, split: Split) -> Example:
    """Draws one question of the split."""
    return rng.choice(PAIRS[split])


def sounds_right(example: Example, answer: str) -> float:
    """1.0 for an answer that begins with "Arr", has two other marks and does not repeat itself."""
    del example  # any answer is right, because only the style matters
    words = re.findall(r"[a-z]+'?", answer.casefold())
    marks = {m for m in MARKERS if m in words or (m == "in'" and re.search(r"[a-z]in'", answer))}
    triples = list(zip(words, words[1:], words[2:], strict=False))
    circles = len(triples) - len(set(triples)) > 2
    return float(answer.startswith("Arr") and len(marks - {"arr"}) >= 2 and not circles)


TASK = Task(
    name="pirate",
    summary="Answers any question in the manner of a pirate.",
    method="LoRA",
    config={"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"]},
    generate=generate,
    score=sounds_right,
    metric="in dialect",
    held_out="questions",
    demo=(
        Example("What is the capital of France?", "Arr"),
        Example("What is the wind?", "Arr"),
        Example("Tell me a fact about whales.", "Arr"),
    ),
    check="startswith",
    steps=90,
)
