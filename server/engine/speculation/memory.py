"""What a mix of adapters has answered lately: the answers of an adapter resemble each other."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from turret.server.engine.speculation.chances import Chances
from turret.server.engine.speculation.text_index import TextIndex

# Begins an answer; no token's id.
START = -1
# The fewest tokens of earlier answers that a memory keeps, and the most memories: together a few
# tens of megabytes, and a hundred if all their tokens differ.
_MAX_TOKENS = 4096
_MAX_MEMORIES = 128


class MixMemory:
    """Earlier answers of one mix, and how often drafts for it were right.

    Attributes:
        own: Of drafts from a request's own text.
        earlier: Of drafts from earlier answers.
    """

    def __init__(self) -> None:
        self.own = Chances()
        self.earlier = Chances()
        self._tokens = array("i")
        self._index = TextIndex(self._tokens, most=_MAX_TOKENS)

    def find(self, answer: Sequence[int]) -> tuple[int, int]:
        """As ``TextIndex.find``; ``answer`` begins with ``START``."""
        return self._index.find(answer)

    def after(self, place: int, count: int) -> list[int]:
        """At most ``count`` tokens from a place on, to the end of the answer there."""
        found = self._tokens[place : place + count].tolist()
        return found[: found.index(START)] if START in found else found

    def add(self, answer: Sequence[int]) -> None:
        """Remember an answer, which begins with ``START``."""
        if len(self._tokens) > 2 * _MAX_TOKENS:
            self._tokens = self._tokens[-_MAX_TOKENS:]
            self._index = TextIndex(self._tokens, most=_MAX_TOKENS)
        self._tokens.extend(answer[: 1 + _MAX_TOKENS])
        self._index.read()


class Memories:
    """The memories that were used last: one for each mix and salt."""

    def __init__(self) -> None:
        self._by_key: OrderedDict[Hashable, MixMemory] = OrderedDict()

    def of(self, key: Hashable) -> MixMemory:
        """The memory of a key, which begins empty."""
        found = self._by_key.get(key)
        if found is None:
            found = self._by_key[key] = MixMemory()
            if len(self._by_key) > _MAX_MEMORIES:
                self._by_key.popitem(last=False)
        self._by_key.move_to_end(key)
        return found
