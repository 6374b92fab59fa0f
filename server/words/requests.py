"""What is wrong with a request: its fields, its size, what it names."""

TEXTS = {
    "DID_YOU_MEAN": "; did you mean {closest!q}?",
    "TOO_MANY_ENTRIES": "at most {most} entries, not {found}",
    "TOO_MANY_CHARACTERS": "at most {most} characters, not {found}",
}
