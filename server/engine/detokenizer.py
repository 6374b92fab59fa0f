"""Turns a sequence's tokens into text that never has to be taken back.

Text that might be the beginning of a stop string is held until the next tokens decide.
"""

from __future__ import annotations

from collections.abc import Collection

from turret.server.engine.scheduling.request import StopConditions, TextStream
from turret.server.errors import InvalidRequestError
from turret.server.words import say


class Detokenizer:
    """Incremental text of one sequence, with stop strings.

    Attributes:
        stopped_by: The stop string that was found, or None.
    """

    def __init__(
        self, stream: TextStream, stop_strings: Collection[str], include_stop: bool
    ) -> None:
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


# An answer's text as its tokens come, and where it ends by itself.


class AnswerText:
    """Turns tokens into final text and reports which token ends the answer.

    Args:
        stream: Decodes token by token.
        stop: When the answer ends; ``max_tokens`` is not looked at.
        eos_token_ids: The model's end-of-sequence tokens.
        is_constrained: They are drawn only where the answer is complete, and always end it.

    Attributes:
        stopped_by: The stop string or token that has ended the answer, or None.
    """

    def __init__(
        self,
        stream: TextStream,
        stop: StopConditions,
        eos_token_ids: frozenset[int],
        *,
        is_constrained: bool = False,
    ) -> None:
        self._stop = stop
        self._always = eos_token_ids if is_constrained else frozenset()
        self._ends = stop.stop_token_ids | (frozenset() if stop.ignore_eos else eos_token_ids)
        self._detokenizer = Detokenizer(stream, stop.stop_strings, stop.include_stop)
        self._num_tokens = 0
        self.stopped_by: str | int | None = None

    def push(self, token: int) -> str:
        """Add a token; returns the text that it makes final."""
        self._num_tokens += 1
        may_stop = self._num_tokens >= self._stop.min_tokens
        if token in self._always or (may_stop and token in self._ends):
            self.stopped_by = token
            # An end token is no text of the answer, unless the client wants to see it.
            text = self._detokenizer.push(token) if self._stop.include_stop else ""
        else:
            text = self._detokenizer.push(token, may_stop=may_stop)
        if self._detokenizer.stopped_by is None:
            return text if self.stopped_by is None else text + self.flush()
        if self.stopped_by is None:
            self.stopped_by = self._detokenizer.stopped_by
        return text

    def replay(self, tokens: Collection[int]) -> None:
        """Take in what an earlier answer to the same request began with; its text is not wanted.

        Raises:
            InvalidRequestError: The answer ended at one of them.
        """
        for index, token in enumerate(tokens):
            self.push(token)
            if self.stopped_by is not None:
                raise InvalidRequestError.of("answer_so_far", say("ANSWER_ENDED", index=index))

    def flush(self) -> str:
        """Text held back, for an answer that ends for another reason."""
        return self._detokenizer.flush()
