"""Searches a sequence of tokens for another one."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

_CODEC = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"


def last_occurrence(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """The start of the last occurrence of ``wanted`` in ``tokens``, or None."""
    # Search the reversed tokens as text, which takes linear time for any tokens.
    found = _text(tokens).find(_text(wanted))
    return None if found < 0 else len(tokens) - len(wanted) - found


def _text(tokens: Sequence[int]) -> str:
    """The tokens as text, with one character per token and the last one first."""
    return array("I", tokens[::-1]).tobytes().decode(_CODEC, "surrogatepass")
