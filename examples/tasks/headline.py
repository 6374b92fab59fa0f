"""Task ``headline``: one sentence of news → a headline."""

from __future__ import annotations

import random
import re

from .task import Example, Split, TaskData, words

SUBJECTS = {
    "train": words(
        "city council, school board, local bakery, fire department, weather service, football "
        "club, state museum, young scientist, train company, mayor, night guard, steel factory, "
        "book club, police chief, garden center, small airline, music teacher, court, river "
        "port, national bank, history society, wine maker, coast guard, radio station, rescue "
        "team, paper mill, sailing crew, farm union, dance school, harbor office, taxi driver, "
        "village doctor, fashion house, phone maker, student group"
    ),
    "test": words("town library, space agency, chess team, city zoo, film studio, power company"),
}
# Past tense, as in the sentence, and present tense, as in the headline.
VERBS = (
    ("approved", "Approves"),
    ("opened", "Opens"),
    ("closed", "Closes"),
    ("lost", "Loses"),
    ("won", "Wins"),
    ("bought", "Buys"),
    ("found", "Finds"),
    ("sold", "Sells"),
    ("showed", "Shows"),
    ("saved", "Saves"),
)
OBJECTS = {
    "train": words(
        "new bridge, old church, gold medal, stolen painting, free concert, public park, rare "
        "bird, red tractor, big contract, winter market, secret garden, lost dog, record "
        "harvest, school bus, new hospital, long trial, summer camp, giant cake, empty house, "
        "road plan, wooden boat, blue diamond, hidden letter, concert hall, world record, "
        "mountain trail, fishing net, glass tower, baby elephant, tax plan, fast train, street "
        "fair, ancient coin, ski race, cooking contest, tennis court, electric bus, poetry "
        "prize, sports center"
    ),
    "test": words("new telescope, silver cup, white tiger, open air cinema, art prize, green park"),
}
TIMES = (
    "on Monday",
    "on Friday",
    "last night",
    "this morning",
    "yesterday",
    "on Sunday evening",
    "this week",
    "after a long debate",
    "to the surprise of many",
)


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
