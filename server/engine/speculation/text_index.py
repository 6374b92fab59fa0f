"""Where in a growing text some tokens stood before."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

# Tokens that are compared with a place at most: more would tell nothing more.
MAX_MATCH = 8
# Places of one token that are compared, the latest first.
_MAX_PLACES = 16


class TextIndex:
    """Finds the last tokens of a text in what stands before them, or in another text.

    A dictionary has the latest place of each token, a table for each place the one before it: a
    token is added in constant time, and takes some forty bytes.

    Args:
        tokens: The text, which may only grow at its end.
        start: Tokens before it are none of the text.
        most: Tokens that are remembered; once there are twice as many, only the last so many are.
    """

    def __init__(self, tokens: Sequence[int], start: int = 0, *, most: int) -> None:
        self._tokens = tokens
        self._start = start
        self._most = most
        # The index after a token's latest place: where its follower stands.
        self._latest: dict[int, int] = {}
        # Position minus ``_start`` → the token's previous position, or -1.
        self._before = array("q")

    def read(self) -> None:
        """Take in what the text has grown by."""
        tokens = self._tokens
        if len(tokens) - self._start > 2 * self._most:
            self._start = len(tokens) - self._most
            self._latest.clear()
            self._before = array("q")
        latest, before = self._latest, self._before
        if not before and len(tokens) > self._start:
            before.append(-1)
        # A token is found by its follower: the text's last one is not there yet.
        for index in range(self._start + len(before), len(tokens)):
            token = tokens[index - 1]
            before.append(latest.get(token, -1))
            latest[token] = index

    def find(self, tail: Sequence[int]) -> tuple[int, int]:
        """The place whose tokens in front agree with the end of ``tail`` for longest.

        Args:
            tail: At least one token; the text itself, or another.

        Returns:
            The index of what followed there, and how many tokens agree, at most ``MAX_MATCH``; the
            latest of equal places. (0, 0) if there is none.
        """
        tokens, end = self._tokens, len(tail) - 1
        best, longest = 0, 0
        place = self._latest.get(tail[end], -1)
        for _ in range(_MAX_PLACES):
            if place < 0:
                break
            last = place - 1
            most, match = min(MAX_MATCH, place - self._start, len(tail)), 1
            while match < most and tokens[last - match] == tail[end - match]:
                match += 1
            if match > longest:
                best, longest = place, match
                if match == MAX_MATCH:
                    break
            place = self._before[place - self._start]
        return best, longest
