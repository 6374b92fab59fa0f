"""Masks of the next tokens that constraints allow in a step.

A mask is made on a thread of its own while the step is computed. Where the likeliest token is drawn
and the host computes the logits itself, there is mostly none to make: whether that one token may
come is asked once it is known, at a tenth of a mask's cost. It is taken in at the same time, before
the sequence has it: what is read and written lies in the caches then.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from turret.server.constraints.matcher import Matcher, Words, roomy_executor
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.errors import TurretError
from turret.server.words import say

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenMask:
    """The tokens that a sequence may go on with.

    Attributes:
        words: ``[words]`` int32: token ``t`` is bit ``t % 32`` of word ``t // 32``.
        error: Why there is no mask and the request ends; None if there is one.
    """

    words: Words | None
    error: TurretError | None = None


class LateMask:
    """The tokens that a running sequence may go on with, asked for when its logits are there.

    Its methods belong to one thread at a time, which has room on its stack, but for ``news``: that
    is the engine's.

    Args:
        sequence: Has a constraint.
        end_ids: The end tokens of its model.
    """

    def __init__(self, sequence: Sequence, end_ids: frozenset[int]) -> None:
        constraint, stop = sequence.request.constraint, sequence.request.stop
        assert constraint is not None
        self._sequence = sequence
        self._constraint = constraint
        self._matcher: Matcher | None = None
        # End tokens to withhold: always (ignore_eos), and until min_tokens is reached. Even so, a
        # complete answer ends where the grammar allows nothing else.
        self._ends = end_ids if stop.ignore_eos else frozenset[int]()
        self._early_ends = end_ids | stop.stop_token_ids if stop.min_tokens else self._ends
        self._min_tokens = stop.min_tokens
        self._num_told = 0
        # A token that the matcher has already consumed but the sequence does not have yet.
        self._ahead: int | None = None
        self._made: TokenMask | None = None

    def news(self) -> list[int]:
        """The sequence's tokens since the last call."""
        fresh = self._sequence.tokens[self._sequence.prompt_end + self._num_told :]
        self._num_told += len(fresh)
        return fresh

    def settle(self, token_id: int) -> int | None:
        """Find the next token without a mask: the likeliest, or another that is forced.

        Args:
            token_id: The likeliest of all.

        Returns:
            None where ``make`` has to tell.
        """
        fresh = self.news()
        # No new token: the step is computed again with the same logits, so the result stays the
        # same.
        if not fresh and (self._ahead is not None or self._made is not None):
            return self._ahead
        self._made = None
        try:
            if self._ahead is not None:
                assert fresh[0] == self._ahead, "the token that was settled is the one drawn"
                fresh, self._ahead = fresh[1:], None
            matcher = self._at(fresh)
            self._ahead = matcher.take(token_id, self._withheld(matcher))
        except BaseException as error:
            self._made = _failed(error)
        return self._ahead

    def make(self, fresh: SequenceOf[int] = ()) -> TokenMask:
        """Make the mask of the next token.

        Args:
            fresh: What ``news`` gave, if it is not taken in yet.
        """
        # No new token means that a step ran out of memory and is computed again: keep its mask.
        if self._made is None or fresh:
            try:
                matcher = self._at(fresh)
                self._made = TokenMask(matcher.mask(self._withheld(matcher)))
            except BaseException as error:
                self._made = _failed(error)
        return self._made

    def _at(self, fresh: SequenceOf[int]) -> Matcher:
        """The matcher, advanced by these tokens."""
        matcher = self._matcher
        if matcher is None:
            matcher = self._matcher = self._constraint.matcher()
            # Before the first draw, the answer so far comes from the client: check it.
            matcher.check(fresh)
        for token in fresh:
            matcher.advance(token)
        return matcher

    def _withheld(self, matcher: Matcher) -> frozenset[int]:
        """Tokens that are allowed only if no other token is."""
        return self._early_ends if matcher.num_tokens < self._min_tokens else self._ends


def _failed(error: BaseException) -> TokenMask:
    """Turn an error into a mask; Rust panics are BaseExceptions and must not end this thread."""
    if isinstance(error, TurretError):
        return TokenMask(None, error)
    _log.error("a constraint failed", exc_info=error)
    return TokenMask(None, TurretError(say("INTERNAL")))


# The allowed next tokens of a sequence, computed now or on demand.
Mask = TokenMask | LateMask


class Masks:
    """The constraints of running sequences. Used by the engine thread alone.

    A sequence keeps its place in its grammar when it is preempted.

    Args:
        end_ids: The model's end tokens.
        is_late: Whether who draws can ask for masks when the logits are there. The engine thread
            must have room on its stack (``constraints/threads.py``).
    """

    def __init__(self, end_ids: frozenset[int], *, is_late: bool = False) -> None:
        self._end_ids = end_ids
        self._is_late = is_late
        self._followed: dict[Sequence, LateMask] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._late: dict[Sequence, LateMask] = {}
        self._early: list[Sequence] = []
        self._making: Future[list[TokenMask]] | None = None

    def begin(self, sequences: SequenceOf[Sequence]) -> None:
        """Have the masks of these sequences' next tokens made, beside what the caller does next."""
        self._late, self._early = {}, []
        work: list[tuple[LateMask, list[int]]] = []
        for sequence in sequences:
            if sequence.request.constraint is None:
                continue
            followed = self._followed.get(sequence)
            if followed is None:
                ends = sequence.request.ends(self._end_ids)
                followed = self._followed[sequence] = LateMask(sequence, ends)
            if self._is_late and _is_greedy(sequence):
                self._late[sequence] = followed
            else:
                self._early.append(sequence)
                work.append((followed, followed.news()))
        if work:
            if self._thread is None:
                # A thread of our own: matchers need a larger stack than a library's executor has.
                self._thread = roomy_executor(1, "masks")
            self._making = self._thread.submit(lambda: [one.make(tokens) for one, tokens in work])

    def take(self) -> dict[Sequence, Mask]:
        """The masks that ``begin`` was asked for, once they are there."""
        masks: dict[Sequence, Mask] = {**self._late}
        if self._making is not None:
            # Wait even if the step failed: a matcher must not be used by two threads at once.
            made = self._making.result()
            masks.update(zip(self._early, made, strict=True) if self._early else ())
        self._late, self._early, self._making = {}, [], None
        return masks

    def forget(self, sequence: Sequence) -> None:
        """Drop a finished sequence's place."""
        self._followed.pop(sequence, None)


def _is_greedy(sequence: Sequence) -> bool:
    # A sequence with its own vocabulary size is drawn from a separate row.
    return sequence.request.sampling.is_greedy and not sequence.vocab_size
