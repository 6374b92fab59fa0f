"""What somebody may have meant by a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Longer names are no slips of a finger, and comparing them takes long.
_MOST_CHARS = 128


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'sql'?"`` where a choice is close to the word, else nothing."""
    if len(word) > _MOST_CHARS:
        return ""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close and close[0] != word else ""
