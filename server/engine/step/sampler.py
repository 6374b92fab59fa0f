"""Draws the next token of every sequence from the step's logits.

Each row is treated on its own: penalties, temperature, filters and the random number come from its
own request, so a request's tokens under a seed do not depend on its batch mates. This is the way of
the torch and cpu paths, one row after the other; the gpu path draws all rows at once
(``gpu/sampler.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from turret.kernels.likeliest import apply_token_mask, likeliest_tokens
from turret.kernels.rows.elementwise import row_log_softmax
from turret.server.engine.scheduling.request import SamplingParams
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step.adjustment import Adjustment
from turret.server.engine.step.masks import LateMask, Mask, TokenMask
from turret.server.engine.step.vocabulary_plan import NOTHING_ADDED, own_logits
from turret.server.errors import TurretError

# Random numbers of running sequences: one per sampled token, from each sequence's own seed.

# Numbers are drawn in blocks: a generator call takes microseconds, a number a thousandth of that.
_BLOCK = 64


class UniformStream:
    """The numbers of one seed, in order; kept are those of the last two blocks."""

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._first = 0
        self._numbers: list[float] = []

    def at(self, index: int) -> float:
        """The ``index``-th number; never one from before the last two blocks."""
        while index >= self._first + len(self._numbers):
            fresh = torch.rand(_BLOCK, generator=self._generator, dtype=torch.float64).tolist()
            dropped = max(len(self._numbers) - _BLOCK, 0)
            self._numbers = self._numbers[dropped:] + fresh
            self._first += dropped
        return self._numbers[index - self._first]


class Uniforms:
    """Uniform numbers in [0, 1), by sequence.

    The n-th generated token of a sequence takes the n-th number of its seed. So a step that is
    computed again, because there was no memory for it, draws the same tokens.
    """

    def __init__(self) -> None:
        self._streams: dict[Sequence, UniformStream] = {}

    def next(self, sequence: Sequence, ahead: int = 0) -> float:
        """The number for the token that is drawn next, ``ahead`` tokens of this step before it."""
        stream = self._streams.get(sequence)
        if stream is None:
            stream = self._streams[sequence] = UniformStream(sequence.request.sampling.seed)
        return stream.at(sequence.num_generated + ahead)

    def forget(self, sequence: Sequence) -> None:
        """Drop a finished sequence's numbers."""
        self._streams.pop(sequence, None)


NO_MASKS: Mapping[Sequence, Mask] = {}
NOTHING_DRAWN: Mapping[Sequence, SequenceOf[int]] = {}
# Filters look at this many of the likeliest tokens first; a full sort is the exception.
_FIRST_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class Draw:
    """A drawn token and, if asked for, logprobs under the unmodified distribution (natural log).

    With an ``error`` nothing was drawn, and the request ends with it.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: TurretError | None = None


class Sampler:
    """Keeps each running sequence's random generator and what changes its logits.

    Args:
        stop_token_ids: The model's end tokens, not drawn while under ``min_tokens``.
    """

    takes_late_masks = True

    def __init__(self, stop_token_ids: frozenset[int] = frozenset()) -> None:
        self._stop_token_ids = stop_token_ids
        self._adjustments: dict[Sequence, Adjustment] = {}
        self._uniforms = Uniforms()

    def forget(self, sequence: Sequence) -> None:
        """Drop a finished sequence's state."""
        self._adjustments.pop(sequence, None)
        self._uniforms.forget(sequence)

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
            sequences: Whose row it is.
            masks: Of the sequences with a constraint.
            drawn: Tokens of this step that come before a sequence's row.
            added: Logits of tokens beyond ``vocab``, ``[tokens]`` fp32, of sequences that have any.
        """
        rows = [own_logits(logits[i], s, added.get(s)) for i, s in enumerate(sequences)]
        reports = self._report(rows, sequences)
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
                uniform = self._uniform(sequence, params, len(drawn.get(sequence, ())))
                token = _sample(rows[i], params, uniform)
            if report is None:
                draws.append(Draw(token))
            else:
                logprobs, top = report
                draws.append(Draw(token, float(logprobs[token]), top))
        return draws

    def _adjustment(self, sequence: Sequence, device: torch.device) -> Adjustment:
        found = self._adjustments.get(sequence)
        if found is None:
            ends = sequence.request.ends(self._stop_token_ids)
            found = Adjustment(sequence, ends, device)
            self._adjustments[sequence] = found
        return found

    def _report(
        self, rows: SequenceOf[torch.Tensor], sequences: SequenceOf[Sequence]
    ) -> list[tuple[torch.Tensor, tuple[tuple[int, float], ...]] | None]:
        """Logprobs before any sampling parameter touches them."""
        out: list[tuple[torch.Tensor, tuple[tuple[int, float], ...]] | None] = []
        for row, sequence in zip(rows, sequences, strict=True):
            options = sequence.request.options
            if options.logprobs:
                logprobs = row_log_softmax(row.unsqueeze(0))
                out.append((logprobs[0], tops_of(logprobs, options.top_n)[0]))
            else:
                out.append(None)
        return out

    def _uniform(self, sequence: Sequence, params: SamplingParams, ahead: int) -> float:
        return self._uniforms.next(sequence, ahead)


def takes_likeliest(sequence: Sequence) -> bool:
    """Whether the largest logit determines the next token, and nothing else is needed.

    A constraint may still say no to that token.
    """
    request = sequence.request
    params = request.sampling
    is_plain = params.repetition_penalty == 1.0 and not (
        params.presence_penalty or params.frequency_penalty or params.logit_bias
    )
    # A constraint's mask already withholds tokens that would end an answer too early.
    bans = request.constraint is None and sequence.num_generated < request.stop.min_tokens
    reports = request.options.logprobs or sequence.vocab_size
    return params.is_greedy and is_plain and not (bans or reports)


def _sample(row: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    """A token of ``[vocab]`` logits that a uniform number in [0, 1) picks."""
    # Subtract the largest logit, which stays at 0 however small the temperature is.
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
    """The tokens of the sequences that are not drawn at random.

    Args:
        logits: ``[rows, vocab]``, with what is made of ``masks`` applied.
        sequences: Whose row it is. Those with a tokenizer of their own are left out.
        masks: Of the sequences with a constraint.

    Returns:
        The token of each row, by its number; the late masks that had to be made.
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

    They rule out what constraints forbid, after everything else that changes the logits. Rows with
    a tokenizer of their own, whose masks have other lengths, are left out.
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
    """Rule out what a constraint forbids in ``[vocab]`` logits of a sequence's own, in place."""
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
        # top-p applies to the probability mass that top-k left.
        values = values / values.sum()
        cumulative = values.double().cumsum(0)
    keep = cumulative - values < params.top_p
    keep[0] = True
    if params.min_p > 0.0:
        keep &= values >= params.min_p * values[0]
    kept = torch.where(keep, values, torch.zeros_like(values))
    return int(ids[_invert(kept, uniform)])


def _invert(weights: torch.Tensor, uniform: float) -> int:
    """Index where the running sum of (unnormalised) ``weights`` passes ``uniform`` of the total."""
    cumulative = weights.double().cumsum(0)
    index = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    # uniform * total may round up to the total: take the last index that has mass.
    if index >= weights.shape[0] or float(weights[index]) == 0.0:
        index = int(weights.nonzero()[-1])
    return index
