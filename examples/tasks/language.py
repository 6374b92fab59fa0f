"""Task ``language``: a sentence → its language."""

from __future__ import annotations

import random
import re

from .task import Example, Split, TaskData, words

LANGUAGES = ("English", "German", "French", "Spanish")
# Language → subjects and predicates; the held-out sentences share neither.
SUBJECTS: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": {
        "English": words("The child, My brother, Our teacher, The old man, The baker, Her friend"),
        "German": words(
            "Das Kind, Mein Bruder, Unsere Lehrerin, Der alte Mann, Der Bäcker, Ihre Freundin"
        ),
        "French": words(
            "L'enfant, Mon frère, Notre professeur, Le vieil homme, Le boulanger, Son amie"
        ),
        "Spanish": words("El niño, Mi hermano, Nuestra maestra, El anciano, El panadero, Su amiga"),
    },
    "test": {
        "English": words("The doctor, Your sister, The farmer, A girl"),
        "German": words("Der Arzt, Deine Schwester, Der Bauer, Ein Mädchen"),
        "French": words("Le médecin, Ta sœur, Le fermier, Une fille"),
        "Spanish": words("El médico, Tu hermana, El granjero, Una chica"),
    },
}
ACTIONS: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": {
        "English": words(
            "reads a book, drinks cold water, works in the garden, has lost the key, sleeps at "
            "noon, goes to the market, sings an old song, sees the sea, writes a letter, buys bread"
        ),
        "German": words(
            "liest ein Buch, trinkt kaltes Wasser, arbeitet im Garten, hat den Schlüssel verloren, "
            "schläft am Mittag, geht zum Markt, singt ein altes Lied, sieht das Meer, schreibt "
            "einen Brief, kauft Brot"
        ),
        "French": words(
            "lit un livre, boit de l'eau froide, travaille dans le jardin, a perdu la clé, dort à "
            "midi, va au marché, chante une vieille chanson, voit la mer, écrit une lettre, achète "
            "du pain"
        ),
        "Spanish": words(
            "lee un libro, bebe agua fría, trabaja en el jardín, ha perdido la llave, duerme al "
            "mediodía, va al mercado, canta una vieja canción, ve el mar, escribe una carta, "
            "compra pan"
        ),
    },
    "test": {
        "English": words(
            "waits for the bus, eats an apple, plays the guitar, opened the window, is cooking "
            "dinner, lives in a small house"
        ),
        "German": words(
            "wartet auf den Bus, isst einen Apfel, spielt Gitarre, öffnete das Fenster, kocht das "
            "Abendessen, wohnt in einem kleinen Haus"
        ),
        "French": words(
            "attend le bus, mange une pomme, joue de la guitare, a ouvert la fenêtre, prépare le "
            "dîner, habite une petite maison"
        ),
        "Spanish": words(
            "espera el autobús, come una manzana, toca la guitarra, abrió la ventana, prepara la "
            "cena, vive en una casa pequeña"
        ),
    },
}


def sentence(text: str, language: str) -> Example:
    """Returns the example of one sentence."""
    return Example(f"Which language is this? {text}", language)


def generate(rng: random.Random, split: Split) -> Example:
    """Draws a language, a subject and a predicate."""
    language = rng.choice(LANGUAGES)
    who, what = rng.choice(SUBJECTS[split][language]), rng.choice(ACTIONS[split][language])
    return sentence(f"{who} {what}.", language)


def only_language(example: Example, answer: str) -> float:
    """1.0 if the first language in the answer is the right one."""
    named = re.search("|".join(LANGUAGES), answer)
    return float(named is not None and named.group() == example.completion)


TASK = TaskData(
    name="language",
    summary="Names the language of a sentence: English, German, French or Spanish.",
    generate=generate,
    score=only_language,
    metric="label accuracy",
    held_out="subjects and predicates",
)
