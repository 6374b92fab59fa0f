"""What is wrong with a request: its fields, its size, what it names."""

TEXTS = {
    "DID_YOU_MEAN": "; did you mean {closest!q}?",
    "TOO_MANY_ENTRIES": "at most {most} entries, not {found}",
    "TOO_MANY_CHARACTERS": "at most {most} characters, not {found}",
    "REQUIRED": "is required",
    "NEEDS_FIELD": "requires {other}",
    "CONFLICTS_WITH": "cannot be combined with {other}",
    "DUPLICATE": "{value!q} is listed more than once",
    "NOT_IN_RANGE": "must be between {least:g} and {most:g}, not {value:g}",
}
