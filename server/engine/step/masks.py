"""What constraints let the next tokens of a step be, made while the step is computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from turret.server.constraints.matcher import Matcher, Words, words_of
from turret.server.constraints.threads import roomy_executor
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.errors import TurretError

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


class _Followed:
    """A running sequence with a constraint."""

    def __init__(self, sequence: Sequence, end_ids: frozenset[int]) -> None:
        constraint, stop = sequence.request.constraint, sequence.request.stop
        assert constraint is not None
        self._constraint = constraint
        self._matcher: Matcher | None = None
        # Both alike: an answer that is complete ends where it cannot go on.
        self._ends = words_of(end_ids, constraint.num_words) if stop.ignore_eos else None
        self._early_ends = self._ends
        if stop.min_tokens:
            self._early_ends = words_of(end_ids | stop.stop_token_ids, constraint.num_words)
        self._min_tokens = stop.min_tokens
        self._num_told = 0
        self._made: TokenMask | None = None

    def news(self, sequence: Sequence) -> list[int]:
        """Its tokens since the last time, on the engine thread."""
        fresh = sequence.tokens[sequence.prompt_end + self._num_told :]
        self._num_told += len(fresh)
        return fresh

    def mask(self, fresh: list[int]) -> TokenMask:
        """The mask of what follows these tokens too, on the thread of masks."""
        # Nothing new: a step that found no memory is computed again.
        if self._made is None or fresh:
            self._made = self._make(fresh)
        return self._made

    def _make(self, fresh: list[int]) -> TokenMask:
        try:
            if self._matcher is None:
                self._matcher = self._constraint.matcher()
                # All that is there before the first draw is what the client says of its answer.
                self._matcher.check(fresh)
            for token in fresh:
                self._matcher.advance(token)
            is_early = self._matcher.num_tokens < self._min_tokens
            return TokenMask(self._matcher.mask(self._early_ends if is_early else self._ends))
        except TurretError as error:
            return TokenMask(None, error)
        # What Rust panics with is no Exception, and must not end the engine thread.
        except BaseException:
            _log.exception("a constraint failed")
            return TokenMask(None, TurretError("internal error"))


class Masks:
    """The constraints of running sequences. Used by the engine thread alone.

    A sequence keeps its place in its grammar when it is preempted.

    Args:
        end_ids: The model's end tokens.
    """

    def __init__(self, end_ids: frozenset[int]) -> None:
        self._end_ids = end_ids
        self._followed: dict[Sequence, _Followed] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._making: tuple[list[Sequence], Future[list[TokenMask]]] | None = None

    def begin(self, sequences: SequenceOf[Sequence]) -> None:
        """Have the masks of these sequences' next tokens made, beside what the caller does next."""
        constrained = [s for s in sequences if s.request.constraint is not None]
        self._making = None
        if not constrained:
            return
        if self._thread is None:
            # One, and not the executor of a library: it needs room on its stack.
            self._thread = roomy_executor(1, "masks")
        work: list[tuple[_Followed, list[int]]] = []
        for sequence in constrained:
            followed = self._followed.get(sequence)
            if followed is None:
                ends = sequence.request.ends(self._end_ids)
                followed = self._followed[sequence] = _Followed(sequence, ends)
            work.append((followed, followed.news(sequence)))
        future = self._thread.submit(lambda: [one.mask(tokens) for one, tokens in work])
        self._making = constrained, future

    def take(self) -> dict[Sequence, TokenMask]:
        """The masks that ``begin`` was asked for, once they are there."""
        if self._making is None:
            return {}
        sequences, future = self._making
        self._making = None
        return dict(zip(sequences, future.result(), strict=True))

    def forget(self, sequence: Sequence) -> None:
        """Drop a finished sequence's place."""
        self._followed.pop(sequence, None)
