"""Follows a constraint along one answer: which tokens may come next."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from turret.server.constraints.alphabet import Alphabet, Words
from turret.server.constraints.grammar import shortened
from turret.server.errors import BudgetExceededError, InvalidRequestError

if TYPE_CHECKING:
    # Types only; see ``constraint.py``.
    from llguidance import LLMatcher

# Processor time that the masks of one answer may take: at first, and for each token. Ordinary
# grammars take 0.1 ms a token; a literal of 65536 characters takes 40.
_FIRST_SECONDS = 2.0
_TOKEN_SECONDS = 0.005
# llguidance's message when the lexer that all matchers of a constraint share is full.
_LEXER_FULL = "too many states"


class Source(Protocol):
    """Where a matcher comes from (``Constraint``)."""

    def copy(self, *, forces: bool) -> LLMatcher: ...
    def renewed(self, *, forces: bool) -> LLMatcher: ...
    def count(self, seconds: float) -> None: ...


class Matcher:
    """One answer's place in a grammar. One thread at a time.

    Args:
        source: The constraint.
        alphabet: Of its tokenizer.
    """

    def __init__(self, source: Source, alphabet: Alphabet) -> None:
        self._source = source
        self._alphabet = alphabet
        # Forced text is appended as the tokenizer would encode it.
        self._forces = True
        self._native = source.copy(forces=True)
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
        self._follow(lambda: self._native.consume_token(token_id), again=_nothing)

    def take(self, token_id: int, withheld: Collection[int] = ()) -> int | None:
        """Take in a token if it is in the mask, or else the one that is alone there.

        Costs a tenth of a mask, which is not made.

        Args:
            token_id: The token.
            withheld: As for ``mask``.

        Returns:
            The token that was taken in. None if none was: the mask has to tell.

        Raises:
            BudgetExceededError: The grammar is too complex to go on, or took too long.
        """
        taken: int | None = None

        def look() -> None:
            nonlocal taken
            token = self._forced()
            if token is None and token_id not in withheld:
                token = token_id
            taken = None
            if token is not None and self._alphabet.is_plain(token):
                taken = token if self._native.try_consume_tokens([token]) else None

        self._follow(look, again=look)
        self._check_time()
        if taken is not None:
            self._tokens.append(taken)
        return taken

    def mask(self, withheld: Collection[int] = ()) -> Words:
        """The tokens that may come next, ``[words]`` int32: token ``t`` is bit ``t % 32``.

        Args:
            withheld: Tokens that may not come while another one may.

        Raises:
            BudgetExceededError: The grammar is too complex to go on, or took too long.
        """
        words: Words = np.empty(self._alphabet.num_words, dtype=np.int32)
        pointer, size = words.ctypes.data, words.nbytes

        def fill() -> None:
            self._forced()
            self._native.unsafe_compute_mask_ptr(pointer, size)

        self._follow(fill, again=fill)
        self._check_time()
        # llguidance has an error for a mask of nothing.
        if not self._alphabet.keep_drawable(words):
            raise BudgetExceededError("no token of the model can go on with the constraint")
        return without(words, withheld)

    def _check_time(self) -> None:
        if self._seconds > _FIRST_SECONDS + _TOKEN_SECONDS * len(self._tokens):
            raise BudgetExceededError("the constraint takes too long to follow")

    def _forced(self) -> int | None:
        """The one token that may come where only one text may."""
        forced = self._native.compute_ff_tokens()
        if not forced:
            return None
        token = forced[0]
        is_plain = self._alphabet.is_plain(token)
        if is_plain or (
            self._alphabet.is_drawable(token) and self._native.validate_tokens([token])
        ):
            return token
        # A text that happens to be a special token's name: the tokenizer makes that token of it,
        # which means something else, and which the grammar has not got. Or one without logits.
        self._forces = False
        self._native = self._source.copy(forces=False)
        self._native.consume_tokens(self._tokens)
        return None

    def _follow(self, work: Callable[[], object], again: Callable[[], object]) -> None:
        """Do something with the native matcher, and if its lexer is full, ``again`` with a new one.

        The new one has taken in all tokens. Others may have filled the lexer: what becomes of an
        answer must not depend on them.
        """
        start = time.thread_time()
        work()
        if self._native.is_error() and _LEXER_FULL in self._native.get_error():
            self._native = self._source.renewed(forces=self._forces)
            if self._native.consume_tokens(self._tokens):
                again()
        seconds = time.thread_time() - start
        self._seconds += seconds
        self._source.count(seconds)
        if self._native.is_error():
            raise BudgetExceededError(
                f"the constraint is too complex to follow: {shortened(self._native.get_error())}"
            )


def without(words: Words, withheld: Collection[int]) -> Words:
    """A mask without some tokens, unless nothing would be left of it."""
    size = 32 * words.shape[0]
    # Most masks have none of them.
    present = [t for t in withheld if t < size and words[t >> 5] >> (t & 31) & 1]
    if not present:
        return words
    rest = words.copy()
    bits = rest.view(np.uint32)
    for token in present:
        bits[token >> 5] &= np.uint32(~(1 << (token & 31)) & 0xFFFFFFFF)
    return rest if rest.any() else words


def _nothing() -> None:
    pass
