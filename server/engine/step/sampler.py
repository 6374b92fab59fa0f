"""Draws the next token of every sequence from the step's logits.

Each row is treated separately: penalties, temperature, filters and the random number come from its
own request, so a request's tokens for a given seed do not depend on the batch. The torch and cpu
paths draw the rows one by one here; the gpu path draws all rows at once (``gpu_sampler.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from turret.kernels.likeliest import apply_token_mask, likeliest_tokens
from turret.kernels.rows import row_log_softmax
from turret.server.constraints.matcher import Matcher, Words, roomy_executor
from turret.server.engine.scheduling.request import SamplingParams
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step import NOTHING_ADDED, own_logits
from turret.server.errors import TurretError
from turret.server.words import say

# Masks of the tokens that constraints allow next, in a step.
#
# Masks are computed on a separate thread while the step runs. If the likeliest token is drawn and
# the host itself computes the logits, usually no mask is needed: the grammar checks the one token
# once it is known, at a tenth of the cost of a mask. The matcher consumes the token at the same
# time, before the sequence has it, because the data is then in the processor's caches.


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenMask:
    """The tokens that may come next in a sequence.

    Attributes:
        words: ``[words]`` int32: token ``t`` is bit ``t % 32`` of word ``t // 32``.
        error: The reason why there is no mask and the request ends; None if there is a mask.
    """

    words: Words | None
    error: TurretError | None = None


class LateMask:
    """The tokens that may come next in a running sequence, determined when its logits are known.

    The mask is late because it is often not needed: the sampler requests it (``make``) only if the
    likeliest token does not determine the next one (``settle``). If a sequence draws at random, or
    the sampler does not support late masks, ``Masks`` has the mask made while the logits are
    computed.

    One thread at a time, with a large stack, may call its methods; ``news`` belongs to the engine
    thread.

    Args:
        sequence: A sequence with a constraint.
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
        # The last mask, which is valid until the sequence has a new token.
        self._made: TokenMask | None = None

    def news(self) -> list[int]:
        """The sequence's tokens since the last call."""
        fresh = self._sequence.tokens[self._sequence.prompt_end + self._num_told :]
        self._num_told += len(fresh)
        return fresh

    def settle(self, token_id: int) -> int | None:
        """Find the next token without a mask: the likeliest, or another that is forced.

        Args:
            token_id: The likeliest token.

        Returns:
            The next token, or None if only the mask (``make``) can determine it.
        """
        fresh = self.news()
        # Without a new token, the step is being computed again, with the same logits and the same
        # result.
        if not fresh and (self._ahead is not None or self._made is not None):
            return self._ahead
        self._made = None
        try:
            if self._ahead is not None:
                assert fresh[0] == self._ahead, "the token that was settled is the one drawn"
                fresh, self._ahead = fresh[1:], None
            matcher = self._at(fresh)
            self._ahead = matcher.try_advance(token_id, self._withheld(matcher))
        except BaseException as error:
            self._made = _failed(error)
        return self._ahead

    def make(self, fresh: SequenceOf[int] = ()) -> TokenMask:
        """Make the mask of the next token.

        Args:
            fresh: The result of ``news``, if it has not been consumed yet.
        """
        # Without a new token, a step ran out of memory and is being computed again: keep its mask.
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

    A preempted sequence keeps its position in its grammar.

    Args:
        end_ids: The model's end tokens.
        is_late: Whether the sampler can request masks once the logits are known. The engine thread
            then needs a large stack (``constraints/matcher.py``).
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
        """Begin to make the masks of these sequences' next tokens on another thread."""
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
                # Use a separate thread, because matchers need a larger stack than the threads of a
                # standard executor have.
                self._thread = roomy_executor(1, "masks")
            self._making = self._thread.submit(lambda: [one.make(tokens) for one, tokens in work])

    def take(self) -> dict[Sequence, Mask]:
        """Wait for the masks that ``begin`` started; return them and the late masks."""
        masks: dict[Sequence, Mask] = {**self._late}
        if self._making is not None:
            # Wait even if the step failed: a matcher must not be used by two threads at once.
            made = self._making.result()
            masks.update(zip(self._early, made, strict=True) if self._early else ())
        self._late, self._early, self._making = {}, [], None
        return masks

    def forget(self, sequence: Sequence) -> None:
        """Drop a finished sequence's position."""
        self._followed.pop(sequence, None)


def _is_greedy(sequence: Sequence) -> bool:
    # A sequence with its own vocabulary size is drawn from a separate row.
    return sequence.request.sampling.is_greedy and not sequence.vocab_size


# Penalties, biases and bans: the change of a row of logits by a request's sampling parameters.
#
# The tensors for biases and bans are made once per request. For penalties, a step looks only at the
# tokens that are new since the last step. So a step does no Python work for each bias, stop or old
# token.


_FIRST_CAPACITY = 64


class _TokenCounts:
    """Distinct tokens of a growing text and how often each occurs, as tensors.

    Args:
        device: The device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._index: dict[int, int] = {}
        self._ids = torch.zeros(_FIRST_CAPACITY, dtype=torch.int64, device=device)
        self._times = torch.zeros(_FIRST_CAPACITY, dtype=torch.float32, device=device)
        self._num_read = 0

    def read(self, text: list[int], start: int, drawn: SequenceOf[int] = ()) -> None:
        """Count the tokens of ``text``, beginning at ``start``, that are new since the last call.

        Args:
            text: The text, which only grows, except for the tokens in ``drawn``.
            start: The first position to read.
            drawn: Tokens after the text that will become part of it.
        """
        size = len(text) - start
        if self._num_read > size + len(drawn):
            # The step that drew these tokens ran out of memory and is computed again.
            self._forget()
        if self._num_read == size + len(drawn):
            return
        fresh = [*text[start + self._num_read :], *drawn[max(self._num_read - size, 0) :]]
        self._num_read += len(fresh)
        first = len(self._index)
        places = [self._index.setdefault(token, len(self._index)) for token in fresh]
        self._grow(len(self._index))
        # ``new`` is in the order of first occurrence, which is the order of the places.
        new = [token for token in dict.fromkeys(fresh) if self._index[token] >= first]
        if new:
            self._ids[first : len(self._index)] = torch.tensor(new)
        where = torch.tensor(places, device=self._times.device)
        self._times.index_add_(0, where, torch.ones(len(places), device=self._times.device))

    def _forget(self) -> None:
        self._index.clear()
        self._times.zero_()
        self._num_read = 0

    def _grow(self, size: int) -> None:
        if size <= self._ids.shape[0]:
            return
        more = max(size, 2 * self._ids.shape[0]) - self._ids.shape[0]
        self._ids = torch.cat((self._ids, self._ids.new_zeros(more)))
        self._times = torch.cat((self._times, self._times.new_zeros(more)))

    @property
    def ids(self) -> torch.Tensor:
        """``[distinct]`` int64 token ids."""
        return self._ids[: len(self._index)]

    @property
    def times(self) -> torch.Tensor:
        """``[distinct]`` fp32: how often each of ``ids`` occurs."""
        return self._times[: len(self._index)]


def _id_tensor(ids: Iterable[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=device)


class Adjustment:
    """Changes the logits of one sequence, step after step, in the order of the methods below.

    Args:
        sequence: The sequence whose logits change; its tokens may only grow.
        stop_token_ids: The model's end tokens, which are banned before ``min_tokens``, like the
            request's own.
        device: Where the logits are.
    """

    def __init__(
        self, sequence: Sequence, stop_token_ids: frozenset[int], device: torch.device
    ) -> None:
        self._sequence = sequence
        self._params = sequence.request.sampling
        params, stop = sequence.request.sampling, sequence.request.stop
        self._biases: tuple[torch.Tensor, torch.Tensor] | None = None
        if params.logit_bias:
            values = list(params.logit_bias.values())
            biases = torch.tensor(values, dtype=torch.float32, device=device)
            self._biases = _id_tensor(params.logit_bias, device), biases
        self._banned = None
        # If there is a constraint, its mask withholds end tokens, because only the mask shows
        # whether another token is allowed.
        is_free = sequence.request.constraint is None
        if is_free and stop.min_tokens > 0 and (stop_token_ids or stop.stop_token_ids):
            self._banned = _id_tensor(stop_token_ids | stop.stop_token_ids, device)
        self._seen = _TokenCounts(device) if params.repetition_penalty != 1.0 else None
        is_counted = params.presence_penalty or params.frequency_penalty
        self._generated = _TokenCounts(device) if is_counted else None

    def apply(self, row: torch.Tensor, drawn: SequenceOf[int] = ()) -> None:
        """Change ``row`` in place.

        Args:
            row: ``[vocab]`` fp32.
            drawn: Tokens that were drawn in this step and come before the row's.
        """
        for ids, factor in self.factors(drawn):
            # The repetition penalty of CTRL (arXiv 1909.05858), over prompt and output, as in
            # transformers.
            values = row[ids]
            row[ids] = torch.where(values > 0, values / factor, values * factor)
        for ids, amounts in self.penalties(drawn):
            row[ids] -= amounts
        for ids, amounts in self.biases():
            row[ids] += amounts
        for ids in self.bans(drawn):
            row[ids] = float("-inf")

    def factors(self, drawn: SequenceOf[int] = ()) -> Iterator[tuple[torch.Tensor, float]]:
        """Tokens, and the factor of the repetition penalty on their logits in this step."""
        if self._seen is not None:
            self._seen.read(self._sequence.tokens, self._sequence.num_virtual, drawn)
            yield self._seen.ids, self._params.repetition_penalty

    def penalties(self, drawn: SequenceOf[int] = ()) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens, and the number that is subtracted from each one's logit in this step."""
        if self._generated is not None:
            self._generated.read(self._sequence.tokens, self._sequence.prompt_end, drawn)
            times = self._params.frequency_penalty * self._generated.times
            yield self._generated.ids, self._params.presence_penalty + times

    def biases(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens, and the number that is added to each one's logit."""
        if self._biases is not None:
            yield self._biases

    def bans(self, drawn: SequenceOf[int] = ()) -> Iterator[torch.Tensor]:
        """Tokens that may not be drawn in this step."""
        stop = self._sequence.request.stop
        num_before = self._sequence.num_generated + len(drawn)
        if self._banned is not None and num_before < stop.min_tokens:
            yield self._banned


# Random numbers of running sequences: one for each sampled token, from the sequence's own seed.

# Numbers are drawn in blocks: a generator call takes microseconds, a number a thousandth of that.
_BLOCK = 64


class UniformStream:
    """The random numbers of one seed, in order. Only the last two blocks are kept."""

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._first = 0
        self._numbers: list[float] = []

    def at(self, index: int) -> float:
        """The ``index``-th number, which must be in one of the last two blocks."""
        while index >= self._first + len(self._numbers):
            fresh = torch.rand(_BLOCK, generator=self._generator, dtype=torch.float64).tolist()
            dropped = max(len(self._numbers) - _BLOCK, 0)
            self._numbers = self._numbers[dropped:] + fresh
            self._first += dropped
        return self._numbers[index - self._first]


NO_MASKS: Mapping[Sequence, Mask] = {}
NOTHING_DRAWN: Mapping[Sequence, SequenceOf[int]] = {}
# Filters first look at this many of the likeliest tokens. A full sort is rarely needed.
_FIRST_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class Draw:
    """A drawn token and, if requested, logprobs under the unmodified distribution (natural log).

    With an ``error`` nothing was drawn, and the request ends with it.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: TurretError | None = None


class Sampler:
    """Draws tokens. Keeps each running sequence's random numbers and changes of logits.

    For one thread only.

    Args:
        stop_token_ids: The model's end tokens, which are not drawn before ``min_tokens``.

    Attributes:
        takes_late_masks: Whether ``draw`` itself requests the masks that it needs.
    """

    takes_late_masks = True

    def __init__(self, stop_token_ids: frozenset[int] = frozenset()) -> None:
        self._stop_token_ids = stop_token_ids
        self._adjustments: dict[Sequence, Adjustment] = {}
        self._streams: dict[Sequence, UniformStream] = {}

    def forget(self, sequence: Sequence) -> None:
        """Drop a finished sequence's state."""
        self._adjustments.pop(sequence, None)
        self._streams.pop(sequence, None)

    def draw(
        self,
        logits: torch.Tensor,
        sequences: SequenceOf[Sequence],
        masks: Mapping[Sequence, Mask] = NO_MASKS,
        drawn: Mapping[Sequence, SequenceOf[int]] = NOTHING_DRAWN,
        added: Mapping[Sequence, torch.Tensor] = NOTHING_ADDED,
    ) -> list[Draw]:
        """Draw one token per row.

        Args:
            logits: ``[rows, vocab]`` fp32; modified in place.
            sequences: The sequence of each row.
            masks: The masks of the sequences with a constraint.
            drawn: Tokens of this step that come before a sequence's row.
            added: Logits of tokens beyond ``vocab``, ``[tokens]`` fp32, of sequences that have any.
        """
        rows = [own_logits(logits[i], s, added.get(s)) for i, s in enumerate(sequences)]
        # Logprobs are taken before any sampling parameter changes the logits.
        reports = [_report(row, sequence) for row, sequence in zip(rows, sequences, strict=True)]
        for row, sequence in zip(rows, sequences, strict=True):
            self._adjustment(sequence, logits.device).apply(row, drawn.get(sequence, ()))
        if (masked := masked_rows(sequences, masks)) is not None:
            apply_token_mask(logits, *masked)
        greedy, late = _greedy_tokens(logits, sequences, masks)
        made = {s: mask for s, mask in masks.items() if isinstance(mask, TokenMask)} | late
        for i, sequence in enumerate(sequences):
            if sequence.vocab_size:
                _mask_own(rows[i], made.get(sequence))
                greedy[i] = int(likeliest_tokens(rows[i].unsqueeze(0)))
        draws = []
        for i, (sequence, report) in enumerate(zip(sequences, reports, strict=True)):
            mask = made.get(sequence)
            if mask is not None and mask.error is not None:
                draws.append(Draw(-1, error=mask.error))
                continue
            params = sequence.request.sampling
            if params.is_greedy:
                token = greedy[i]
            else:
                uniform = self._uniform(sequence, len(drawn.get(sequence, ())))
                token = _sample(rows[i], params, uniform)
            if report is None:
                draws.append(Draw(token))
            else:
                logprobs, top = report
                draws.append(Draw(token, float(logprobs[token]), top))
        return draws

    def keeps(self, token: int, sequence: Sequence, drawn: SequenceOf[int] = ()) -> bool:
        """Whether the likeliest token stays the likeliest; see ``takes_likeliest``."""
        adjustment = self._adjustment(sequence, torch.device("cpu"))
        lowered = [*(ids for ids, _ in adjustment.biases()), *adjustment.bans(drawn)]
        return not any(token in ids for ids in lowered)

    def _adjustment(self, sequence: Sequence, device: torch.device) -> Adjustment:
        found = self._adjustments.get(sequence)
        if found is None:
            ends = sequence.request.ends(self._stop_token_ids)
            found = Adjustment(sequence, ends, device)
            self._adjustments[sequence] = found
        return found

    def _uniform(self, sequence: Sequence, ahead: int = 0) -> float:
        """The random number for the token that is ``ahead`` positions after the next one.

        The n-th generated token of a sequence takes the n-th number of its seed. So a step that is
        computed again, because there was no memory for it, draws the same tokens.
        """
        stream = self._streams.get(sequence)
        if stream is None:
            stream = self._streams[sequence] = UniformStream(sequence.request.sampling.seed)
        return stream.at(sequence.num_generated + ahead)


def _report(
    row: torch.Tensor, sequence: Sequence
) -> tuple[torch.Tensor, tuple[tuple[int, float], ...]] | None:
    """Logprobs of ``[vocab]`` logits and the likeliest tokens, if the request asks for them."""
    options = sequence.request.options
    if not options.logprobs:
        return None
    logprobs = row_log_softmax(row.unsqueeze(0))
    return logprobs[0], tops_of(logprobs, options.top_n)[0]


def takes_likeliest(sequence: Sequence) -> bool:
    """Whether the likeliest token usually is the next one, and nothing else is needed.

    A ban, a negative bias or a constraint changes the next token only if it concerns the likeliest
    one; ``Sampler.keeps`` checks bans and biases. Penalties concern so many of the likeliest tokens
    that it is better to compute all logits.
    """
    params = sequence.request.sampling
    raises = max(params.logit_bias.values(), default=0.0) > 0.0
    penalises = (
        params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    )
    reports = sequence.request.options.logprobs or sequence.vocab_size
    return params.is_greedy and not (raises or penalises or reports)


def _sample(row: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    """The token that a uniform number in [0, 1) picks from ``[vocab]`` logits."""
    # Subtract the largest logit first, so that it stays 0 however low the temperature is.
    scaled = (row - row.max()) / params.temperature
    if params.top_k == 0 and params.top_p == 1.0:
        if params.min_p > 0.0:
            # p >= min_p * p_max  <=>  logit >= max logit + log(min_p)
            limit = scaled.max() + torch.log(torch.tensor(params.min_p))
            scaled = scaled.masked_fill(scaled < limit, float("-inf"))
        return _invert(scaled.softmax(-1), uniform)
    return _sample_filtered(scaled, params, uniform)


def _greedy_tokens(
    logits: torch.Tensor, sequences: SequenceOf[Sequence], masks: Mapping[Sequence, Mask]
) -> tuple[dict[int, int], dict[Sequence, TokenMask]]:
    """The next tokens of the greedy sequences.

    Args:
        logits: ``[rows, vocab]``, with all available masks applied.
        sequences: The sequence of each row. Those with a vocabulary of their own are left out.
        masks: The masks of the sequences with a constraint.

    Returns:
        The token of each row, by row number; and the late masks that had to be computed.
    """
    numbers = [
        row
        for row, sequence in enumerate(sequences)
        if sequence.request.sampling.is_greedy and not sequence.vocab_size
    ]
    if not numbers:
        return {}, {}
    places = torch.tensor(numbers, device=logits.device)
    tokens = dict(zip(numbers, likeliest_tokens(logits, places).tolist(), strict=True))
    made: dict[Sequence, TokenMask] = {}
    for row, likeliest in tokens.items():
        mask = masks.get(sequences[row])
        if isinstance(mask, LateMask):
            token = mask.settle(likeliest)
            if token is None:
                made[sequences[row]] = mask.make()
            else:
                tokens[row] = token
    if (masked := masked_rows(sequences, made)) is not None:
        places, words = (part.to(logits.device) for part in masked)
        best = likeliest_tokens(logits, places, words).tolist()
        tokens.update(zip(masked[0].tolist(), best, strict=True))
    return tokens, made


def masked_rows(
    sequences: SequenceOf[Sequence], masks: Mapping[Sequence, Mask]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows with a mask, ``[rows]`` int64, and the masks, ``[rows, words]`` int32, on the host.

    The masks are applied after all other changes of the logits. Rows with a vocabulary of their
    own, whose masks have other lengths, are left out.
    """
    rows, words = [], []
    for row, sequence in enumerate(sequences):
        mask = masks.get(sequence)
        if not isinstance(mask, TokenMask) or sequence.vocab_size:
            continue
        if mask.words is not None:
            rows.append(row)
            words.append(mask.words)
    if not rows:
        return None
    return torch.tensor(rows), torch.from_numpy(np.stack(words))


def _mask_own(row: torch.Tensor, mask: TokenMask | None) -> None:
    """Rule out forbidden tokens in ``[vocab]`` logits, in place.

    This is for a sequence with a vocabulary of its own.
    """
    if mask is not None and mask.words is not None:
        words = torch.from_numpy(mask.words).unsqueeze(0).to(row.device)
        apply_token_mask(row.unsqueeze(0), torch.zeros(1, dtype=torch.int64).to(row.device), words)


def tops_of(logprobs: torch.Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """The ``count`` likeliest (token id, logprob) of each row, likeliest first."""
    values, ids = logprobs.topk(min(count, logprobs.shape[1]))
    rows = zip(ids.tolist(), values.tolist(), strict=True)
    return [tuple(zip(*row, strict=True)) for row in rows]


def _sample_filtered(scaled: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    """Top-k, then top-p, then min-p, on candidates in falling order of probability."""
    vocab = scaled.shape[0]
    probabilities = scaled.softmax(-1)
    size = min(params.top_k or _FIRST_CANDIDATES, vocab)
    while True:
        values, ids = probabilities.topk(size)
        cumulative = values.double().cumsum(0)
        if params.top_k or size == vocab or float(cumulative[-1]) >= params.top_p:
            break
        size = min(size * 8, vocab)
    if params.top_k:
        # Top-p applies to the probability mass that is left after top-k.
        values = values / values.sum()
        cumulative = values.double().cumsum(0)
    keep = cumulative - values < params.top_p
    keep[0] = True
    if params.min_p > 0.0:
        keep &= values >= params.min_p * values[0]
    kept = torch.where(keep, values, torch.zeros_like(values))
    return int(ids[_invert(kept, uniform)])


def _invert(weights: torch.Tensor, uniform: float) -> int:
    """Index where the running sum of unnormalised ``weights`` passes ``uniform · total``."""
    cumulative = weights.double().cumsum(0)
    index = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    # uniform * total may round up to the total: take the last index that has mass.
    if index >= weights.shape[0] or float(weights[index]) == 0.0:
        index = int(weights.nonzero()[-1])
    return index
