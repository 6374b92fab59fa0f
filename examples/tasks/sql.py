"""Task ``sql``: a question over one small table → one SQL SELECT."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from . import fusion_words
from .task import Example, Split, Task, words


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the data set.

    Attributes:
        name: Table name, a plural noun.
        label: Column that identifies a row to a reader.
        number: A numeric column.
        category: A text column with the ``values``.
        values: Values of ``category``.
    """

    name: str
    label: str
    number: str
    category: str
    values: tuple[str, ...]

    @property
    def schema(self) -> str:
        return f"{self.name}({self.label}, {self.category}, {self.number})"


# One table per line: its name(label, category, number), then values of the category.
SCHEMAS: dict[str, str] = {
    "train": """
books(title, author, price): Ada Hill, Jane Gray, Paul Stone, Oskar Lindqvist, T. H. Abbott
songs(title, genre, length): jazz, rock, folk, soul, bolero, ska, bluegrass
employees(name, department, salary): sales, finance, legal, logistics, research, human resources
cities(name, country, population): Peru, Japan, Spain, Kenya, Uruguay, Bulgaria, New Zealand
flights(code, airline, distance): Nordair, SkyOne, Meridian, Vuelo, Kestrel Air, Zephyra
students(name, school, grade): Northside, Hilltop, Lakeview, St. Brigid, Oakhurst, Wexford Hall
products(name, category, stock): toys, garden, kitchen, stationery, bathroom, pet food
orders(id, customer, amount): Tom Reed, Lena Koch, Aisha Khan, Bjorn Eklund, Noor Rahman, Ms. Pryce
rooms(number, hotel, rate): Astoria, Seaview, Park Inn, Belvedere, Grand Ridge, Casa Verde
players(name, team, goals): Tigers, Rovers, United, Wanderers, Falcons, Athletico
recipes(title, cuisine, minutes): Thai, Greek, Indian, Moroccan, Vietnamese, Georgian
patients(name, doctor, age): Dr. Moss, Dr. Lind, Dr. Vega, Dr. Quigley, Dr. Osei, Dr. Marchetti
trees(species, park, height): Greenwood, Elm Park, Riverside, Thornhill, Kew Meadow, Birchfield
invoices(id, supplier, total): Acme, Borealis, Delta Tools, Zellweg, Corvo and Sons, Harkness
ships(name, harbor, tonnage): Bremen, Piraeus, Port Said, Busan
paintings(title, artist, width): Ilse Brandt, Tomas Vrba, Lady Orme
bridges(name, river, span): Danube, Mekong, Volga, Tagus
tickets(id, theater, cost): Odeon, Globe Hall, Lyric, Paragon
drivers(name, sponsor, points): Kolibri, Maxwell, Tern Oil, Yuzu
lectures(topic, speaker, seats): Prof. Bianco, Prof. Zhou, Dr. Ames
phones(model, maker, weight): Lumio, Pallas, Ardent, Xenon
festivals(name, town, visitors): Redwood, Halcyon, Mirage, Bluff
""",
    "test": """
movies(title, director, rating): Greta Lund, Omar Said, Kei Mori
cars(model, brand, mileage): Volta, Cavallo, Norden
mountains(name, range, elevation): Andes, Alps, Rockies
courses(title, teacher, credits): Prof. Hale, Prof. Ito
wines(label, region, vintage): Rioja, Mosel, Douro
""",
}


def parse(line: str) -> Table:
    """Reads one line of ``SCHEMAS``."""
    name, label, category, number, values = re.split(r"\(|\): |, ", line, maxsplit=4)
    return Table(name, label, number, category, words(values))


# Words from which hundreds of tables of the split "fusion" are composed, because a gate that sees
# only a few values memorises them.
NOUNS = words(
    "museums, games, planes, hospitals, novels, dogs, concerts, bikes, lakes, chefs, plants, "
    "trains, articles, castles, beers, islands, apps, farms, lawyers, satellites, schools, "
    "statues, boats, trucks, poems, cheeses, sculptures, websites, stadiums, airports, operas, "
    "beaches, bakeries, candles, lamps, watches, maps, comets, temples, quilts"
)
LABELS = words("name, title, code, id")
NUMBERS = words(
    "area, copies, seats, beds, pages, weight, price, gears, depth, stars, height, speed, "
    "views, year, cost, downloads, acres, cases, mass, length, age, votes, rooms, floors, "
    "width"
)
CATEGORIES = {
    "person": words("narrator, conductor, editor, owner, sculptor, curator, founder, keeper"),
    "place": words("district, county, province, valley, court, street, port"),
    "brand": words("studio, builder, restaurant, operator, dynasty, brewery, vendor, agency"),
    "word": words("breed, color, climate, ocean, material, style"),
}
TITLES = words("Dr., Prof., Mr., Ms., Captain, Lady")
BRAND_STARTS = words(
    "Stone, Bright, Kupfer, Orbit, Pixel, Silver, Iron, Blue, Falcon, Lantern, Cedar, Amber, "
    "Quick, North, Soft, Anchor"
)
BRAND_ENDS = words("bahn, well, code, works, line, forge, gate, mark, field, craft, leaf, point")
COMPOSED = 600


def compose(rng: random.Random) -> Table:
    """A table of the split "fusion" with three values."""
    kind = rng.choice(tuple(CATEGORIES))

    def value() -> str:
        if kind == "person":
            start = TITLES if rng.random() < 0.4 else fusion_words.FIRST_NAMES
            return f"{rng.choice(start)} {rng.choice(fusion_words.LAST_NAMES)}"
        if kind == "brand":
            start, end = rng.choice(BRAND_STARTS), rng.choice(BRAND_ENDS)
            return start + end if rng.random() < 0.6 else f"{start} {end.capitalize()}"
        return rng.choice(fusion_words.PLACES if kind == "place" else fusion_words.THINGS)

    return Table(
        rng.choice(NOUNS),
        rng.choice(LABELS),
        rng.choice(NUMBERS),
        rng.choice(CATEGORIES[kind]),
        (value(), value(), value()),
    )


_COMPOSER = random.Random("sql/fusion")
TABLES: dict[Split, tuple[Table, ...]] = {
    "train": tuple(parse(line) for line in SCHEMAS["train"].strip().splitlines()),
    "fusion": tuple(compose(_COMPOSER) for _ in range(COMPOSED)),
    "test": tuple(parse(line) for line in SCHEMAS["test"].strip().splitlines()),
}

# Each pattern has several wordings and the query. Names in braces are those of `fill`.
PATTERNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Which {table} have {category} {value}? Give the {label}.",
            "List the {label} of all {table} whose {category} is {value}.",
            "Show the {label} of {table} with {category} {value}.",
        ),
        "SELECT {label} FROM {table} WHERE {category} = '{value}';",
    ),
    (
        (
            "How many {table} have {category} {value}?",
            "Count the {table} whose {category} is {value}.",
        ),
        "SELECT COUNT(*) FROM {table} WHERE {category} = '{value}';",
    ),
    (
        ("How many {table} are there?", "Count all {table}."),
        "SELECT COUNT(*) FROM {table};",
    ),
    (
        (
            "List the {label} of {table} with {number} over {n}.",
            "Which {table} have {number} above {n}? Give the {label}.",
        ),
        "SELECT {label} FROM {table} WHERE {number} > {n};",
    ),
    (
        (
            "List the {label} of {table} with {number} under {n}.",
            "Which {table} have {number} below {n}? Give the {label}.",
        ),
        "SELECT {label} FROM {table} WHERE {number} < {n};",
    ),
    (
        (
            "Show the {label} of the {k} {table} with the highest {number}.",
            "Give the {label} of the top {k} {table} by {number}.",
        ),
        "SELECT {label} FROM {table} ORDER BY {number} DESC LIMIT {k};",
    ),
    (
        (
            "Show the {label} of the {k} {table} with the lowest {number}.",
            "Give the {label} of the bottom {k} {table} by {number}.",
        ),
        "SELECT {label} FROM {table} ORDER BY {number} ASC LIMIT {k};",
    ),
    (
        ("What is the average {number} of all {table}?", "Give the mean {number} of {table}."),
        "SELECT AVG({number}) FROM {table};",
    ),
    (
        (
            "What is the average {number} of {table} whose {category} is {value}?",
            "Give the mean {number} of {table} with {category} {value}.",
        ),
        "SELECT AVG({number}) FROM {table} WHERE {category} = '{value}';",
    ),
    (
        ("What is the highest {number} of all {table}?", "Give the largest {number} in {table}."),
        "SELECT MAX({number}) FROM {table};",
    ),
    (
        (
            "How many {table} are there for each {category}?",
            "Count the {table} per {category}.",
        ),
        "SELECT {category}, COUNT(*) FROM {table} GROUP BY {category};",
    ),
)


def ask(
    table: Table, pattern: int, wording: int, *, value: str = "", n: int = 0, k: int = 0
) -> Example:
    """Returns the example of one pattern and wording over one table."""
    questions, query = PATTERNS[pattern]
    fill = {
        "table": table.name,
        "label": table.label,
        "number": table.number,
        "category": table.category,
        "value": value,
        "n": n,
        "k": k,
    }
    question = questions[wording].format(**fill)
    return Example(f"SQL for {table.schema}: {question}", query.format(**fill))


def generate(rng: random.Random, split: Split) -> Example:
    """Draws a table, a pattern and a wording."""
    table = rng.choice(TABLES[split])
    pattern = rng.randrange(len(PATTERNS))
    return ask(
        table,
        pattern,
        rng.randrange(len(PATTERNS[pattern][0])),
        value=rng.choice(table.values),
        n=rng.choice((5, 10, 12, 25, 40, 60, 75, 100, 150, 300, 500, 900)),
        k=rng.randint(2, 9),
    )


def same_query(example: Example, answer: str) -> float:
    """1.0 if the answer's first SELECT is the expected query.

    Case, white space, kind of quote, an explicit ``ASC`` and the final semicolon are ignored, and
    so is anything around the query.
    """

    def normal(query: str) -> str:
        query = re.sub(r"\s+", " ", query.replace('"', "'")).strip().casefold()
        return query.replace(" asc ", " ").replace("( ", "(").rstrip("; ")

    found = re.search(r"select\b[^;`]*", answer, flags=re.IGNORECASE)
    return float(found is not None and normal(found.group()) == normal(example.completion))


MOVIES, CARS, MOUNTAINS, _, _ = TABLES["test"]

TASK = Task(
    name="sql",
    summary="Answers a question over a stated table with one SQL SELECT.",
    method="rsLoRA",
    config={
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["v_proj", "down_proj"],
    },
    generate=generate,
    score=same_query,
    metric="same query",
    held_out="tables and text values",
    demo=(
        ask(MOVIES, 0, 1, value="Greta Lund"),
        ask(MOUNTAINS, 5, 0, k=3),
        ask(CARS, 10, 0),
    ),
    steps=180,
)
