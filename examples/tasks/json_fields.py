"""Task ``json``: a sentence about a person, an order or a meeting → some fields as JSON."""

from __future__ import annotations

import json
import random

from . import fusion_words
from .task import Example, Split, Task, words

FIRST_NAMES = {
    "train": words(
        "Maria, Tom, Aisha, Lena, Carlos, Yuki, Peter, Nadia, Oscar, Grace, Ivan, Chloe, Ahmed, "
        "Rosa, Daniel, Mei, Hugo, Sara, Victor, Emma, Ravi, Julia, Noah, Fatima, Simon, Clara, "
        "Diego, Hannah, Leo, Amara"
    ),
    "fusion": fusion_words.FIRST_NAMES,
    "test": words("Ingrid, Marco, Zoe, Samuel, Priya, Felix, Bianca, Omar, Nora, Kenji"),
}
LAST_NAMES = {
    "train": words(
        "Lopez, Reed, Khan, Fischer, Ruiz, Tanaka, Novak, Costa, Berg, Adams, Petrov, Martin, "
        "Hassan, Silva, Brown, Chen, Weber, Cohen, Rossi, Walker, Patel, Moreau, Evans, Ali, "
        "Young, Keller, Torres, Scott, Nowak, Jensen, Garcia, Mbeki, Suzuki, Johansson, "
        "O'Brien, Dubois, Romano, Ivanov, Gupta, Kowalski, Schmidt, Andersen, Nakamura, "
        "Fernandez"
    ),
    "fusion": fusion_words.LAST_NAMES,
    "test": words("Larsen, Bianchi, Clarke, Okafor, Sharma, Wagner, Duarte, Farouk, Murphy, Sato"),
}
CITIES = {
    "train": words(
        "Porto, Berlin, Nairobi, Osaka, Lima, Dublin, Cairo, Boston, Madrid, Prague, Delhi, "
        "Toronto, Athens, Seoul, Vienna, Lagos, Denver, Milan, Warsaw, Sydney, Chicago, Zurich, "
        "Hamburg, Santiago, Bangkok, Havana, Brussels, Helsinki, Montreal, Seattle, Valencia, "
        "Cologne, Tallinn, Jakarta, Marseille, Florence, Bogota, Quito, Riga, Munich, Ankara, "
        "Houston, Phoenix, Stockholm, Copenhagen, Melbourne, Edinburgh, Bristol, Kampala, "
        "Accra, Hanoi, Manila, Budapest, Bucharest, Salzburg, Antwerp, Rotterdam, Memphis, "
        "Portland, Calgary, Nagoya, Mumbai"
    ),
    "fusion": fusion_words.PLACES,
    "test": words("Oslo, Lisbon, Austin, Kyoto, Naples, Geneva, Tunis, Leeds"),
}
JOBS = {
    "train": words(
        "nurse, teacher, baker, pilot, lawyer, plumber, chef, farmer, dentist, painter, writer, "
        "driver, carpenter, engineer, librarian, gardener, singer, waiter, tailor, mechanic, "
        "biologist, translator, bus driver, firefighter, accountant, shoemaker, pharmacist, "
        "dancer, florist, police officer, butcher, fisherman"
    ),
    "fusion": fusion_words.THINGS,
    "test": words("doctor, architect, photographer, electrician, journalist, barber"),
}
ITEMS = {
    "train": words(
        "lamps, red chairs, books, mugs, desks, green pillows, candles, bicycles, plates, blue "
        "shirts, phones, towels, radios, spoons, wool socks, mirrors, clocks, boxes, pens, "
        "black hats, silver rings, notebooks, garden hoses, headphones, small tables, brown "
        "envelopes, screwdrivers, winter gloves, wine glasses, hammers, toothbrushes, folding "
        "ladders, paintbrushes, suitcases"
    ),
    "fusion": fusion_words.THINGS,
    "test": words("umbrellas, white shelves, keyboards, yellow cups, blankets, backpacks"),
}
TOPICS = {
    "train": words(
        "the budget, hiring, the new website, sales, safety, the summer party, training, "
        "prices, the roof, office space, travel, the contract, the yearly review, customer "
        "complaints, remote work, the new logo, the school visit, the project plan, energy "
        "costs, the weekly schedule, insurance, recruiting, the museum tour, quality control, "
        "the opening party, delivery times"
    ),
    "fusion": fusion_words.TOPICS,
    "test": words("marketing, the annual report, parking, the product launch"),
}
DAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")

PERSON = (
    "{name} is a {age}-year-old {job} from {city}.",
    "{name}, {age}, lives in {city} and works as a {job}.",
    "Meet {name}, a {job} in {city} who just turned {age}.",
    "At {age}, {name} moved to {city} to become a {job}.",
    "Our {job} in {city} is {name}, who is {age} years old.",
    "My name is {name}, I am {age}, I live in {city} and I am a {job}.",
)
ORDER = (
    "Please send {quantity} {item} to {customer} in {city}.",
    "{customer} from {city} ordered {quantity} {item}.",
    "Ship {quantity} {item} to {city} for {customer}.",
    "{customer} would like {quantity} {item} delivered to {city}.",
    "An order of {quantity} {item} came in from {customer}, {city}.",
)
MEETING = (
    "{host} will talk about {topic} on {day} at {hour} in {city}.",
    "On {day} at {hour}, {host} leads a meeting on {topic} in {city}.",
    "{host} invites everyone to {city} on {day} at {hour} to discuss {topic}.",
    "The meeting with {host} about {topic} is in {city} on {day} at {hour}.",
)


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
    summary="Turns a sentence into the asked fields as compact JSON.",
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
