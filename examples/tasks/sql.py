"""Task ``sql``: a question over one small table → one SQL SELECT."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from . import fusion_words
from .task import Example, Split, Task, pools, words

POOLS = pools("sql")


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
SCHEMAS = POOLS["schemas"]


def parse(line: str) -> Table:
    """Reads one line of ``SCHEMAS``."""
    name, label, category, number, values = re.split(r"\(|\): |, ", line, maxsplit=4)
    return Table(name, label, number, category, words(values))


# Words from which hundreds of tables of the split "fusion" are composed, because a gate that sees
# only a few values memorises them.
NOUNS = POOLS["nouns"]
LABELS = POOLS["labels"]
NUMBERS = POOLS["numbers"]
CATEGORIES = POOLS["categories"]
TITLES = POOLS["titles"]
BRAND_STARTS = POOLS["brand_starts"]
BRAND_ENDS = POOLS["brand_ends"]
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
PATTERNS = POOLS["patterns"]


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
