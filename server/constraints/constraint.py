"""A compiled constraint, shared by all requests that ask for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from turret.server.constraints.alphabet import Alphabet
from turret.server.constraints.matcher import Matcher

if TYPE_CHECKING:
    # Types only: the GPU benchmark runs steps where llguidance is not installed.
    from llguidance import LLMatcher

# Copies of a matcher share the states of one lexer, which only become more. After so much processor
# time spent on following it (thousands of ordinary answers) a constraint begins with a new one.
RENEW_SECONDS = 0.5
# About what an answer's place in the grammar takes, what is shared with others left out.
MATCHER_BYTES = 64 << 10


class Make(Protocol):
    """Compiles a constraint; does not fail once it has not failed.

    Args:
        forces: See ``Constraint.copy``.
    """

    def __call__(self, *, forces: bool) -> LLMatcher: ...


class Constraint:
    """Makes matchers, on one thread at a time.

    Args:
        make: Compiles it.
        alphabet: Of its tokenizer.
        num_bytes: About what the compiled form takes in memory.
    """

    def __init__(self, make: Make, alphabet: Alphabet, num_bytes: int) -> None:
        self._make = make
        self._prototypes = {True: make(forces=True)}
        self._alphabet = alphabet
        self._seconds = 0.0
        self.num_bytes = num_bytes

    def matcher(self) -> Matcher:
        """A matcher at the beginning of an answer."""
        if self._seconds > RENEW_SECONDS:
            self._renew()
        return Matcher(self, self._alphabet)

    # For matchers.

    def copy(self, *, forces: bool) -> LLMatcher:
        """One at the beginning, with the newest lexer.

        Args:
            forces: Whether the tokens of a text that must come are those that the tokenizer makes
                of it, or any that spell it.
        """
        found = self._prototypes.get(forces)
        if found is None:
            # Few answers need it: it is made when the first one does.
            found = self._prototypes[forces] = self._make(forces=forces)
        return found.deep_copy()

    def renewed(self, *, forces: bool) -> LLMatcher:
        """One at the beginning, with a lexer that nobody has used."""
        self._renew()
        return self.copy(forces=forces)

    def count(self, seconds: float) -> None:
        """Note processor time that a matcher took."""
        self._seconds += seconds

    def _renew(self) -> None:
        self._prototypes = {True: self._make(forces=True)}
        self._seconds = 0.0
