"""The closest match for a name that does not exist. Any part of turret may import this file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Maximum length of names to compare: longer names are not typos, and comparing them takes long.
_MOST_CHARS = 128
_FEW_CHARS = 3


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that is closest to the word; None if none is close, or it is the word itself."""
    if len(word) > _MOST_CHARS:
        return None
    known = {choice.lower(): choice for choice in choices}
    # The common prefix of flags must not make them similar.
    bare = {choice.removeprefix("--"): whole for choice, whole in known.items()}
    plain = word.lower().removeprefix("--")
    # In a short name, one letter in three may differ.
    cutoff = 0.6 if len(plain) <= _FEW_CHARS else 0.7
    close = difflib.get_close_matches(plain, bare, 1, cutoff)
    meant = bare[close[0]] if close else word
    return meant if meant != word else None
