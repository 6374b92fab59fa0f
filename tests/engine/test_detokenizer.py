"""Text that is final once returned, and stop strings across token boundaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turret.server.engine.answer import AnswerText
from turret.server.engine.scheduling.request import StopConditions
from turret.server.models.tokenizer import TokenStream


class Pieces(TokenStream):
    """A text stream in which token ``i`` is the ``i``-th piece."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces = pieces

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]


def feed(
    pieces: Sequence[str], stops: Iterable[str], include_stop: bool = False, min_tokens: int = 0
) -> tuple[list[str], str | int | None]:
    """All outputs until a stop or the end, and the stop."""
    stop = StopConditions(
        stop_strings=tuple(stops), include_stop=include_stop, min_tokens=min_tokens
    )
    answer = AnswerText(Pieces(pieces), stop, frozenset())
    out = []
    for i in range(len(pieces)):
        out.append(answer.push(i))
        if answer.stopped_by is not None:
            return out, answer.stopped_by
    out.append(answer.flush())
    return out, None


def test_text_is_returned_at_once_without_stop_strings() -> None:
    assert feed(["Hel", "lo", " you"], []) == (["Hel", "lo", " you", ""], None)


def test_a_possible_stop_string_is_held_back_until_it_is_decided() -> None:
    out, stopped = feed(["one E", "N", "d two"], ["END"])
    assert out == ["one ", "", "ENd two", ""]
    assert stopped is None


def test_text_under_min_tokens_does_not_stop() -> None:
    out, stopped = feed(["END", "more", "END"], ["END"], min_tokens=3)
    assert ("".join(out), stopped) == ("ENDmore", "END")


@given(
    st.lists(st.text("ab", min_size=0, max_size=3), min_size=1, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_stop_strings_match_a_search_of_the_whole_text(
    pieces: list[str], stops: list[str], include_stop: bool
) -> None:
    out, stopped = feed(pieces, stops, include_stop)
    text = ""
    expected, expected_stop = "".join(pieces), None
    for piece in pieces:
        # The search finds a stop string as soon as its last character arrives.
        text += piece
        found = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
        if found:
            at, _, expected_stop = min(found)
            expected = text[: at + (len(expected_stop) if include_stop else 0)]
            break
    assert ("".join(out), stopped) == (expected, expected_stop)


@pytest.mark.parametrize("stops", [["aa"], ["ab", "b"]])
def test_outputs_are_final(stops: list[str]) -> None:
    """Returned text is a beginning of the final text, for all continuations."""
    for pieces in (["a", "a", "b"], ["b", "a", "b", "a"], ["ab"]):
        final = "".join(feed(pieces, stops)[0])
        shown = ""
        for part in feed(pieces, stops)[0]:
            shown += part
            assert final.startswith(shown)
