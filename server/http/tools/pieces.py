"""The pieces of an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Said:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a tool begins, the ``index``-th of the answer from 0.

    Its id is empty until the answer's reader has given it one, unless the model wrote one.
    """

    index: int
    name: str
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class CallGrown:
    """A call's arguments, JSON, grow by ``text``."""

    index: int
    text: str


Piece = Said | Thought | CallBegun | CallGrown


def possible_start(text: str, mark: str) -> int:
    """Characters at the end of ``text`` that may be the beginning of ``mark``."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0
