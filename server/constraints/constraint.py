"""A compiled constraint, shared by all requests that ask for it."""

from __future__ import annotations

from collections.abc import Callable

from llguidance import LLMatcher

from turret.server.constraints.matcher import Matcher, Words

# Copies of a matcher share the states of one lexer, which only become more. After so much processor
# time spent on following it (thousands of ordinary answers) a constraint begins with a new one.
RENEW_SECONDS = 0.5
# About what an answer's place in the grammar takes, what is shared with others left out.
MATCHER_BYTES = 64 << 10


class Constraint:
    """Makes matchers, on one thread at a time.

    Args:
        make: Compiles it; does not fail once it has not failed.
        drawable: See ``Matcher``.
        num_bytes: About what the compiled form takes in memory.
    """

    def __init__(self, make: Callable[[], LLMatcher], drawable: Words, num_bytes: int) -> None:
        self._make = make
        self._prototype = make()
        self._drawable = drawable
        self._seconds = 0.0
        self.num_bytes = num_bytes

    @property
    def num_words(self) -> int:
        """Words of a mask, of 32 tokens each."""
        return self._drawable.shape[0]

    def matcher(self) -> Matcher:
        """A matcher at the beginning of an answer."""
        if self._seconds > RENEW_SECONDS:
            self._renew()
        return Matcher(self, self._drawable)

    # For matchers.

    def copy(self) -> LLMatcher:
        """One at the beginning, with the newest lexer."""
        return self._prototype.deep_copy()

    def renewed(self) -> LLMatcher:
        """One at the beginning, with a lexer that nobody has used."""
        self._renew()
        return self.copy()

    def count(self, seconds: float) -> None:
        """Note processor time that a matcher took."""
        self._seconds += seconds

    def _renew(self) -> None:
        self._prototype = self._make()
        self._seconds = 0.0
