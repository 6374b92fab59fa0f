"""Task ``json``: a sentence about a person, an order or a meeting → some fields as JSON."""

from __future__ import annotations

import json
import random

from . import fusion_words
from .task import Example, Split, Task, pools

POOLS = pools("json_fields")

FIRST_NAMES = {**POOLS["first_names"], "fusion": fusion_words.FIRST_NAMES}
LAST_NAMES = {**POOLS["last_names"], "fusion": fusion_words.LAST_NAMES}
CITIES = {**POOLS["cities"], "fusion": fusion_words.PLACES}
JOBS = {**POOLS["jobs"], "fusion": fusion_words.THINGS}
ITEMS = {**POOLS["items"], "fusion": fusion_words.THINGS}
TOPICS = {**POOLS["topics"], "fusion": fusion_words.TOPICS}
DAYS = POOLS["days"]

PERSON = POOLS["person"]
ORDER = POOLS["order"]
MEETING = POOLS["meeting"]


def sentence(template: str, values: dict[str, object], fields: list[str]) -> Example:
    """Returns the example that asks for ``fields``, in that order, of the filled template."""
    answer = {field: values[field] for field in fields}
    return Example(
        f"JSON with {', '.join(fields)}: {template.format(**values)}",
        json.dumps(answer, separators=(",", ":")),
    )


def generate(rng: random.Random, split: Split) -> Example:
    """Draws a sentence, and three or four of its fields in random order."""
    name = f"{rng.choice(FIRST_NAMES[split])} {rng.choice(LAST_NAMES[split])}"
    city = rng.choice(CITIES[split])
    kind = rng.choice((PERSON, ORDER, MEETING))
    values: dict[str, object] = {"city": city}
    if kind is PERSON:
        values |= {"name": name, "age": rng.randint(18, 79), "job": rng.choice(JOBS[split])}
    elif kind is ORDER:
        quantity = rng.randint(2, 40)
        values |= {"customer": name, "quantity": quantity, "item": rng.choice(ITEMS[split])}
    else:
        hour = f"{rng.randint(8, 19)}:{rng.choice(('00', '15', '30', '45'))}"
        topic = rng.choice(TOPICS[split])
        values |= {"host": name, "topic": topic, "day": rng.choice(DAYS), "hour": hour}
    fields = rng.sample(sorted(values), k=rng.randint(3, 4))
    return sentence(rng.choice(kind), values, fields)


def fields_right(example: Example, answer: str) -> float:
    """Returns the share of the requested fields with the right value in the answer's first object.

    Values are compared as text, ignoring case, and text around the object is ignored. This is
    generous to a model that was not trained on the format.
    """
    expected: dict[str, object] = json.loads(example.completion)
    start = answer.find("{")
    if start < 0:
        return 0.0
    try:
        found, _ = json.JSONDecoder().raw_decode(answer[start:])
    except json.JSONDecodeError:
        return 0.0
    right = [str(found.get(k)).casefold() == str(v).casefold() for k, v in expected.items()]
    return sum(right) / len(right)


TASK = Task(
    name="json",
    summary="Turns a sentence into the requested fields as compact JSON.",
    method="LoRA",
    config={"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    generate=generate,
    score=fields_right,
    metric="fields right",
    held_out="names, places, jobs, items and topics",
    demo=(
        sentence(
            PERSON[0],
            {"name": "Nora Murphy", "age": 42, "job": "architect", "city": "Lisbon"},
            ["name", "age", "city", "job"],
        ),
        sentence(
            ORDER[0],
            {"customer": "Marco Bianchi", "quantity": 12, "item": "umbrellas", "city": "Oslo"},
            ["customer", "item", "quantity"],
        ),
        sentence(
            MEETING[1],
            {
                "host": "Zoe Clarke",
                "topic": "marketing",
                "day": "Friday",
                "hour": "14:30",
                "city": "Naples",
            },
            ["day", "hour", "host", "topic"],
        ),
    ),
    steps=160,
)
