"""Turns a sequence's tokens into text that never has to be taken back.

Text that might be the beginning of a stop string is held until the next tokens decide.
"""

from __future__ import annotations

from collections.abc import Sequence

from turret.server.engine.scheduling.own_text import TextStream


class Detokenizer:
    """Incremental text of one sequence, with stop strings.

    Attributes:
        stopped_by: The stop string that was found, or None.
    """

    def __init__(self, stream: TextStream, stop_strings: Sequence[str], include_stop: bool) -> None:
        self._stream = stream
        self._stops = tuple(stop_strings)
        self._include_stop = include_stop
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Add a token.

        Args:
            token_id: The token.
            may_stop: False while under ``min_tokens``: stop strings in text so far are ignored.

        Returns:
            Text that is final. After a stop string was found, everything before it (and it, with
            ``include_stop``).
        """
        self._held += self._stream.push(token_id)
        if not self._stops:
            return self._take(len(self._held))
        if not may_stop:
            return self._take(len(self._held) - self._possible_start())
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found, key=lambda f: (f[0], -len(f[1])))
            text = self._take(at + (len(self.stopped_by) if self._include_stop else 0))
            self._held = ""
            return text
        return self._take(len(self._held) - self._possible_start())

    def flush(self) -> str:
        """Text held back when the sequence ended for another reason."""
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
