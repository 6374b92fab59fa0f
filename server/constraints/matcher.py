"""Follows a constraint along one answer: which tokens may come next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from llguidance import LLMatcher

from turret.server.constraints.grammar import shortened
from turret.server.errors import BudgetExceededError, InvalidRequestError

# Processor time that the masks of one answer may take: at first, and for each token. Ordinary
# grammars take 0.1 ms a token; a literal of 65536 characters takes 40.
_FIRST_SECONDS = 2.0
_TOKEN_SECONDS = 0.005
# What llguidance says when its lexer, which all matchers of a constraint share, is full.
_LEXER_FULL = "too many states"
Words = np.ndarray[tuple[int], np.dtype[np.int32]]


class Source(Protocol):
    """Where a matcher comes from (``Constraint``)."""

    def copy(self) -> LLMatcher: ...
    def renewed(self) -> LLMatcher: ...
    def count(self, seconds: float) -> None: ...


class Matcher:
    """One answer's place in a grammar. One thread at a time.

    Args:
        source: The constraint.
        drawable: ``[words]`` int32: a bit for every token that can be drawn at all.
    """

    def __init__(self, source: Source, drawable: Words) -> None:
        self._source = source
        self._native = source.copy()
        self._drawable = drawable
        self._tokens: list[int] = []
        self._seconds = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens taken in so far."""
        return len(self._tokens)

    def check(self, token_ids: Sequence[int]) -> None:
        """Refuse the beginning of an answer that the constraint does not allow.

        Raises:
            InvalidRequestError: It does not.
        """
        num_allowed = self._native.validate_tokens(list(token_ids))
        if num_allowed < len(token_ids):
            raise InvalidRequestError.of(
                "answer_so_far", f"the constraint forbids its token {num_allowed}"
            )

    def advance(self, token_id: int) -> None:
        """Take in a token, which the last mask allowed.

        Raises:
            BudgetExceededError: The grammar is too complex to go on.
        """
        self._tokens.append(token_id)
        self._follow(lambda native: native.consume_token(token_id), again=_nothing)

    def mask(self, withheld: Words | None = None) -> Words:
        """The tokens that may come next, ``[words]`` int32: token ``t`` is bit ``t % 32``.

        Args:
            withheld: Tokens that may not come while another one may; as the result.

        Raises:
            BudgetExceededError: The grammar is too complex to go on, or took too long.
        """
        words = np.empty_like(self._drawable)
        pointer, size = words.ctypes.data, words.nbytes

        def fill(native: LLMatcher) -> None:
            native.unsafe_compute_mask_ptr(pointer, size)

        self._follow(fill, again=fill)
        if self._seconds > _FIRST_SECONDS + _TOKEN_SECONDS * len(self._tokens):
            raise BudgetExceededError("the constraint takes too long to follow")
        words &= self._drawable
        if withheld is not None and (rest := words & ~withheld).any():
            return rest
        if not words.any():
            raise BudgetExceededError("no token of the model can go on with the constraint")
        return words

    def _follow(
        self, work: Callable[[LLMatcher], object], again: Callable[[LLMatcher], object]
    ) -> None:
        """Do something with the native matcher, and if its lexer is full, ``again`` with a new one.

        The new one has taken in all tokens. Others may have filled the lexer: what becomes of an
        answer must not depend on them.
        """
        start = time.thread_time()
        work(self._native)
        if self._native.is_error() and _LEXER_FULL in self._native.get_error():
            self._native = self._source.renewed()
            if self._native.consume_tokens(self._tokens):
                again(self._native)
        seconds = time.thread_time() - start
        self._seconds += seconds
        self._source.count(seconds)
        if self._native.is_error():
            raise BudgetExceededError(
                f"the constraint is too complex to follow: {shortened(self._native.get_error())}"
            )


def _nothing(native: LLMatcher) -> None:
    pass


def words_of(token_ids: Iterable[int], num_words: int) -> Words:
    """``[num_words]`` int32 with the bits of some tokens; those beyond have none."""
    bits = np.zeros(32 * num_words, dtype=np.uint8)
    bits[[token for token in token_ids if token < 32 * num_words]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
