"""Task ``label``: a customer's message → one of four labels."""

from __future__ import annotations

import random
import re

from .task import Example, Split, Task

LABELS = ("billing", "shipping", "bug", "praise")

# The held-out messages differ in their wording, not only in their values.
MESSAGES: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": {
        "billing": (
            "I was charged twice for my {item}.",
            "Why does my invoice show {money} more than the price of the {item}?",
            "Please refund the {money} I paid for the {item}.",
            "My credit card was declined when I bought the {item}.",
            "I need a receipt for the {item} I paid for last week.",
            "The discount code did not lower the price of my {item}.",
            "You took {money} from my account and I do not know why.",
            "Can I pay for the {item} in three parts?",
            "I cancelled my plan but you still bill me {money} a month.",
            "The tax on my bill for the {item} looks wrong.",
            "How do I change the card that you charge each month?",
            "My refund of {money} has still not reached my bank.",
        ),
        "shipping": (
            "My {item} has not arrived yet.",
            "The tracking page says the {item} is still in the warehouse.",
            "The courier left the {item} at the wrong house.",
            "When will the {item} be delivered?",
            "I have waited {days} days for my {item}.",
            "The box with my {item} was crushed on the way.",
            "Can you send the {item} to a new address?",
            "The driver never rang and took the {item} back.",
            "Do you deliver the {item} to {place}?",
            "The parcel came, but the {item} was not in it.",
            "My package is stuck at customs in {place} for {days} days.",
            "I moved house. Where is my {item} going now?",
        ),
        "bug": (
            "The app crashes when I open the page of the {item}.",
            "The login button does nothing when I tap it.",
            "I get error {code} each time I save.",
            "The search shows no results, even for {item}.",
            "The screen stays white after the update.",
            "My {item} list disappears when I refresh the page.",
            "The site freezes on the photo of the {item}.",
            "The menu overlaps the text on my phone.",
            "I reset my password, but the form says error {code}.",
            "The filter for {item} does not work any more.",
            "Your app logs me out every {days} minutes.",
            "The page of the {item} loads for ever.",
        ),
        "praise": (
            "I love my new {item}, thank you!",
            "The {item} is the best I have ever owned.",
            "Your team was so kind and helpful.",
            "Great quality, the {item} is perfect.",
            "Thanks for the wonderful service in {place}.",
            "The {item} made my daughter very happy.",
            "Five stars for the {item}!",
            "I will tell all my friends about you.",
            "What a beautiful {item}, well done!",
            "I am so pleased with the {item}.",
            "You solved my question in {days} minutes, amazing.",
            "Keep up the good work, I enjoy the {item} every day.",
        ),
    },
    "test": {
        "billing": (
            "There are two payments for one {item} on my card statement.",
            "I want my money back for the {item}, that is {money}.",
            "The invoice for the {item} has the wrong amount.",
            "Why did the subscription fee go up to {money}?",
            "Please send me a bill for my {item} with the VAT on it.",
        ),
        "shipping": (
            "Where is my {item}? It should have come {days} days ago.",
            "The postman brought my {item} to the neighbour.",
            "How long does delivery of a {item} to {place} take?",
            "My parcel with the {item} seems to be lost.",
            "The tracking number for the {item} has not moved in {days} days.",
        ),
        "bug": (
            "The website shows error {code} when I click on the {item}.",
            "Your app closes by itself as soon as I start it.",
            "I cannot log in, the page just keeps loading.",
            "Since the last update the search for {item} is broken.",
            "The picture of the {item} does not load on my tablet.",
        ),
        "praise": (
            "Thank you so much, the {item} is fantastic!",
            "Best shop in {place}, I am delighted.",
            "The {item} looks gorgeous, I could not be happier.",
            "Your support was friendly and quick, excellent!",
            "Wow, this {item} is even better than I hoped.",
        ),
    },
}
SLOTS: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": {
        "item": (
            "lamp",
            "red jacket",
            "phone case",
            "coffee machine",
            "tent",
            "guitar",
            "office chair",
            "watch",
            "toy train",
            "book",
            "camera",
            "garden table",
        ),
        "place": ("Spain", "Boston", "Norway", "Kenya", "Berlin"),
        "money": ("$20", "$45", "$9", "$130", "$75"),
        "days": ("2", "5", "10", "12"),
        "code": ("404", "500", "17", "E12"),
    },
    "test": {
        "item": ("backpack", "blue sweater", "keyboard", "bicycle", "tea pot", "rug"),
        "place": ("Portugal", "Oslo", "Chile"),
        "money": ("$38", "$64", "$210"),
        "days": ("3", "8", "14"),
        "code": ("503", "E77"),
    },
}


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
