"""Runs a scheduled step on one of the compute paths, and draws its tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from turret.kernels.rows import row_log_softmax
from turret.server.adapters.device import AdapterStore, Resident, StepStore
from turret.server.adapters.operators.soft_prompt import soft_prompt_of
from turret.server.basics.work import is_out_of_memory
from turret.server.engine.scheduling.sequence import Scheduled, Sequence, Step
from turret.server.engine.step import (
    NOTHING_ADDED,
    BatchBuilder,
    Placed,
    StepScalings,
    added_logits,
    changed_rows,
    own_logits,
    scalings_of,
)
from turret.server.engine.step.pooler import Pooler
from turret.server.engine.step.sampler import (
    NOTHING_DRAWN,
    Draw,
    LateMask,
    Mask,
    Masks,
    Sampler,
    takes_likeliest,
    tops_of,
)
from turret.server.errors import BudgetExceededError
from turret.server.models.decoding.decoder import Decoder, LikeliestTokens
from turret.server.models.decoding.layer_ops import KvCache
from turret.server.words import say

# The interface between the engine and the compute paths that run scheduled steps.


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The token with the largest logit of every row from which tokens are drawn.

    Attributes:
        tokens: The tokens, in the order of ``Computed.placed``.
        logits: Computes all logits of those rows, ``[samples, vocab]`` fp32, in case a token is not
            allowed.
    """

    tokens: SequenceOf[int]
    logits: Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Computed:
    """The results of a step.

    Attributes:
        placed: Its sequences and their rows.
        hidden: Final-norm hidden states, ``[at least all rows, hidden]``.
        logits: The logits of every row from which tokens are drawn (``Placed.sampled``), in the
            order of ``placed``, ``[samples, vocab]`` fp32; None if there are no such rows. The next
            step may overwrite it.
        added: For each sequence whose adapter adds tokens, the logits of these tokens in the same
            rows, ``[rows of the sequence, tokens]`` fp32.
        likeliest: Replaces ``logits`` if only the likeliest tokens are needed.
    """

    placed: tuple[Placed, ...]
    hidden: torch.Tensor
    logits: torch.Tensor | None
    added: Mapping[Sequence, torch.Tensor] = field(default_factory=dict)
    likeliest: Likeliest | None = None


_D = TypeVar("_D", bound=Decoder)
_S = TypeVar("_S", bound=AdapterStore)


class Executor(ABC, Generic[_D, _S]):
    """Computes steps. One thread only.

    Args:
        decoder: The base model.
        cache: Keys and values of all sequences.
        store: The adapters.

    Attributes:
        is_asynchronous: Whether ``run`` returns before the step is computed.
        screens_head: Whether an int8 copy of the head determines the tokens of greedy steps.
        store: See above.
    """

    is_asynchronous = False
    screens_head = False

    def __init__(self, decoder: _D, cache: KvCache, store: _S) -> None:
        self._decoder, self._cache, self.store = decoder, cache, store

    @abstractmethod
    def run(self, step: Step) -> Computed:
        """Compute a step. Keys and values of its tokens are in the cache afterwards."""

    @abstractmethod
    def sampler(self, stop_token_ids: frozenset[int]) -> Sampler:
        """Make the sampler for the executor's steps; called once, before the first step.

        Args:
            stop_token_ids: The model's end tokens, which are not drawn before ``min_tokens``.
        """

    def logits(self, sequence: Sequence, hidden: torch.Tensor) -> torch.Tensor:
        """Project hidden states of one sequence onto its own tokens.

        Returns:
            ``[rows, vocab]`` fp32, from ``[rows, hidden]``.
        """
        rows = [(sequence, range(hidden.shape[0]))]
        logits = self._decoder.logits(hidden, changed_rows(rows, self.store, hidden.device, "head"))
        added = added_logits(rows, hidden, self._decoder, self.store)
        return own_logits(logits, sequence, added.get(sequence))

    # Executors override the methods below only if they have something to do there.

    def look_ahead(self) -> None:
        """Do useful work while the host waits for the step's results, if it waits."""

    def forget(self, sequence: Sequence) -> None:
        """Drop any state that is kept for a sequence."""

    def free_memory(self) -> None:
        """Free caches that only save time, if there are any, after a step ran out of memory."""


def fill_prefix(cache: KvCache, sequence: Sequence, start: int) -> None:
    """Write an adapter's prefix into the sequence's blocks, from the block with index ``start``."""
    size = cache.block_size
    prefix = soft_prompt_of(sequence.mix).prefix
    assert prefix is not None
    blocks = sequence.blocks[start : sequence.num_preset // size]
    cache.fill(blocks, prefix.keys, prefix.values, start * size - sequence.num_padding)


def sampled_rows(placed: SequenceOf[Placed]) -> list[tuple[Sequence, range]]:
    """The sequences that sample, and the rows of each among their logits."""
    found: list[tuple[Sequence, range]] = []
    start = 0
    for place in placed:
        if place.samples:
            end = start + len(place.sampled)
            found.append((place.item.sequence, range(start, end)))
            start = end
    return found


class TorchExecutor(Executor[Decoder, StepStore]):
    """The torch and the cpu path.

    Args:
        decoder: The base model.
        cache: Keys and values of all sequences.
        store: The adapters.
        screens_head: Whether to keep an int8 copy of the head, of half its size, which determines
            the tokens of most greedy steps.
    """

    def __init__(
        self, decoder: Decoder, cache: KvCache, store: StepStore, *, screens_head: bool = True
    ) -> None:
        super().__init__(decoder, cache, store)
        self._likeliest = LikeliestTokens.of(decoder) if screens_head else None
        # A copy cannot be made for every head.
        self.screens_head = self._likeliest is not None
        self._builder = BatchBuilder(
            decoder.arch, decoder.ops, cache.block_size, store, decoder.device
        )

    def run(self, step: Step) -> Computed:
        if self._decoder.ops.reads_masked:
            self._cache.clear(step.new_blocks)
        for sequence, start in step.presets:
            fill_prefix(self._cache, sequence, start)
        scalings = scalings_of(step, self.store, self._decoder.device, self._compute)
        placed, hidden = self._compute(step, scalings)
        rows = [row for place in placed if place.samples for row in place.sampled]
        if rows:
            index = torch.tensor(rows, device=hidden.device)
            samples = sampled_rows(placed)
            changes = changed_rows(samples, self.store, hidden.device, "head")
            states = hidden.index_select(0, index)
            if not changes and all(takes_likeliest(sequence) for sequence, _ in samples):
                likeliest = self._find_likeliest(states)
                if likeliest is not None:
                    return Computed(placed, hidden, None, likeliest=likeliest)
            logits = self._decoder.logits(states, changes)
            added = added_logits(samples, states, self._decoder, self.store)
            return Computed(placed, hidden, logits, added)
        return Computed(placed, hidden, None)

    def _find_likeliest(self, states: torch.Tensor) -> Likeliest | None:
        """The likeliest tokens of ``[samples, hidden]``; None if all logits are needed for that."""
        finder = self._likeliest
        if finder is None or (tokens := finder.find(states)) is None:
            return None

        def logits() -> torch.Tensor:
            finder.skip_next_calls()
            return self._decoder.logits(states)

        return Likeliest(tokens, logits)

    def _compute(
        self, step: Step, scalings: StepScalings
    ) -> tuple[tuple[Placed, ...], torch.Tensor]:
        """Compute the hidden states of a step."""
        batch = self._builder.build(step, scalings)
        return batch.placed, self._decoder.forward(batch.input, self._cache)

    def sampler(self, stop_token_ids: frozenset[int]) -> Sampler:
        return Sampler(stop_token_ids)


# The functions below draw the tokens of a step and check its drafts, position by position.
#
# A draft token is right if it equals the token that is drawn in its place. That token is drawn from
# the logits after the tokens before it, with the request's own random number. So the tokens are the
# same as without drafts. This is exact matching, not rejection sampling (arXiv 2211.17192), which
# keeps the distribution but not the tokens of a seed. The first token that differs from the draft
# is also drawn from correct logits, and ends the draft.


NO_MORE_MASKS: Mapping[Sequence, Mask] = {}


@dataclass(slots=True)
class _Run:
    """A sequence's rows, and the tokens drawn from them so far."""

    item: Scheduled
    first_row: int
    draws: list[Draw] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, draw: Draw) -> None:
        self.draws.append(draw)
        self.tokens.append(draw.token_id)

    @property
    def goes_on(self) -> bool:
        """Whether the last drawn token equals the draft's, so that the next row is valid."""
        count = len(self.tokens)
        draft = self.item.draft
        return count <= len(draft) and draft[count - 1] == self.tokens[-1]


def draw_tokens(
    sampler: Sampler,
    logits: torch.Tensor,
    items: SequenceOf[Scheduled],
    masks: Mapping[Sequence, Mask],
    added: Mapping[Sequence, torch.Tensor] = NOTHING_ADDED,
) -> list[list[Draw]]:
    """Draw at least one token for every sequence that samples in a step.

    Args:
        sampler: Draws from rows.
        logits: ``[samples, vocab]`` fp32: for each item a row, and a row for each token of its
            draft; modified in place.
        items: The items that sample, in the order of the rows.
        masks: The masks of the sequences with a constraint, which have no drafts.
        added: See ``Computed``.

    Returns:
        The tokens of each item, in order: the right ones of its draft, and one more.
    """
    runs: list[_Run] = []
    row = 0
    for item in items:
        runs.append(_Run(item, row))
        row += 1 + len(item.draft)
    if row == len(runs):
        sequences = [item.sequence for item in items]
        beyond = {sequence: rows[0] for sequence, rows in added.items()}
        draws = sampler.draw(logits, sequences, masks, NOTHING_DRAWN, beyond)
        return [[draw] for draw in draws]
    going = runs
    while going:
        rows = torch.tensor([run.first_row + len(run.tokens) for run in going])
        sequences = [run.item.sequence for run in going]
        drawn = {run.item.sequence: run.tokens for run in going}
        picked = logits.index_select(0, rows.to(logits.device))
        beyond = {s: added[s][len(drawn[s])] for s in sequences if s in added}
        draws = sampler.draw(picked, sequences, masks, drawn, beyond)
        for run, draw in zip(going, draws, strict=True):
            run.add(draw)
        going = [run for run in going if run.goes_on]
        masks = NO_MORE_MASKS
    return [run.draws for run in runs]


def likeliest_draws(
    sampler: Sampler,
    items: SequenceOf[Scheduled],
    tokens: SequenceOf[int],
    masks: Mapping[Sequence, Mask],
) -> list[list[Draw]] | None:
    """Like ``draw_tokens``, if the likeliest token of every row is already known.

    Args:
        sampler: See ``draw_tokens``.
        items: See ``draw_tokens``.
        tokens: ``[samples]``: the likeliest token of each row.
        masks: See ``draw_tokens``; all of them are late masks.

    Returns:
        The result of ``draw_tokens``. None if a request lowers the logit of its likeliest token, or
        a constraint forbids it, so that all logits are needed.
    """
    drawn: list[list[Draw]] = []
    row = 0
    for item in items:
        run, mask = _Run(item, row), masks.get(item.sequence)
        while not run.tokens or run.goes_on:
            token: int | None = tokens[row + len(run.tokens)]
            if not sampler.keeps(token, item.sequence, run.tokens):
                return None
            if mask is not None:
                assert isinstance(mask, LateMask), "greedy sequences have late masks"
                token = mask.settle(token)
            if token is None:
                return None
            run.add(Draw(token))
        drawn.append(run.draws)
        row += 1 + len(item.draft)
    return drawn


# Logits of prompt positions are computed for this many rows at a time: 64 rows of a vocabulary of
# 150,000 tokens are 38 MB in fp32.
_PROMPT_LOGIT_ROWS = 64


class DeviceFullError(Exception):
    """The device had no memory for a step. Nothing was drawn; its keys and values are invalid."""


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """Logprob of the prompt token at ``position`` (from 0), given the tokens before it."""

    position: int
    draw: Draw


@dataclass(slots=True)
class StepResult:
    """The results of a step by sequence: drawn tokens, prompt logprobs and pooled states.

    For a sequence with a draft, the draws are the accepted tokens of the draft and one more.
    """

    draws: dict[Sequence, SequenceOf[Draw]] = field(default_factory=dict)
    prompt_logprobs: dict[Sequence, list[PromptLogprob]] = field(default_factory=dict)
    pooled: dict[Sequence, array[float]] = field(default_factory=dict)


class Runner:
    """Owns the executor and the sampler. Use it from one thread only.

    Attributes:
        is_asynchronous: Whether the device computes while the host does something else.
    """

    def __init__(self, executor: Executor[Any, Any], stop_token_ids: frozenset[int]) -> None:
        self.is_asynchronous = executor.is_asynchronous
        self._executor = executor
        self._store = executor.store
        self._sampler = executor.sampler(stop_token_ids)
        self._masks = Masks(stop_token_ids, is_late=self._sampler.takes_late_masks)
        self._pooler = Pooler()
        # Adapter key → its bytes of each kind of memory (``AdapterStore.budgets``), cached because
        # they are summed over every module.
        self._needs: dict[str, tuple[int, ...]] = {}

    def run(self, step: Step, meanwhile: Callable[[], None] = lambda: None) -> StepResult:
        """Compute a step. Keys and values of its tokens are in the cache afterwards.

        Args:
            step: The step.
            meanwhile: Called once the step is launched.

        Raises:
            DeviceFullError: There is too little memory; a smaller step may succeed.
            AdapterMemoryError: There is no memory for an adapter.
        """
        reason = ""
        for _ in range(2):
            try:
                return self._compute(step, meanwhile)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            # Free memory outside the except block: the exception keeps the step's tensors alive.
            self._executor.free_memory()
        raise DeviceFullError(reason)

    def _compute(self, step: Step, meanwhile: Callable[[], None]) -> StepResult:
        self._masks.begin([item.sequence for item in step.scheduled if item.samples])
        with torch.inference_mode():
            computed = self._executor.run(step)
            meanwhile()
            self._executor.look_ahead()
            result = StepResult()
            self._sample(computed, result)
            for placed in computed.placed:
                if placed.item.sequence.request.wants_prompt_logprobs:
                    self._score(placed, computed.hidden, result)
            result.pooled = self._pooler.pool(computed.placed, computed.hidden)
            return result

    def fits(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Whether a sequence's adapters, which are in host memory, fit with those that run."""
        return self._missing((sequence, *running)) is None

    def is_near(self, sequence: Sequence) -> bool:
        """Whether a sequence can run without waiting for its adapters, which are in host memory.

        Starts copies of missing adapters, which continue while other sequences run.
        """
        # Ask for every adapter before ``all``, so that the copies run in parallel.
        near = [self._store.is_near(adapter) for adapter, _ in sequence.mix.members]
        return all(near)

    def refusal(self, sequence: Sequence) -> BudgetExceededError | None:
        """The error for a sequence that can never run, even alone; None if it can."""
        if any(self._store.is_refused(adapter.key) for adapter, _ in sequence.mix.members):
            return BudgetExceededError(say("DEVICE_MEMORY_SHORT"))
        missing = self._missing((sequence,))
        if missing is None:
            return None
        needed, budget = missing
        return BudgetExceededError(say("MIX_TOO_LARGE", bytes=needed, budget_bytes=budget))

    def _missing(self, sequences: Iterable[Sequence]) -> tuple[int, int] | None:
        """The total size of the sequences' adapters and the budget that it exceeds, or None.

        Each adapter counts once.
        """
        distinct = {a.key: a for s in sequences for a, _ in s.mix.members}
        needed = zip(*map(self._needs_of, distinct.values()), strict=True)
        pairs = zip(map(sum, needed), self._store.budgets, strict=False)
        return next((pair for pair in pairs if pair[0] > pair[1]), None)

    def _needs_of(self, adapter: Resident) -> tuple[int, ...]:
        known = self._needs.get(adapter.key)
        if known is None:
            assert adapter.operators is not None, "its request is ready or runs"
            known = self._needs[adapter.key] = self._store.needs(adapter.operators)
        return known

    def forget_adapter(self, key: str) -> None:
        """Free the device memory of an adapter that was unloaded or replaced."""
        self._needs.pop(key, None)
        self._store.drop(key)

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence."""
        self._sampler.forget(sequence)
        self._executor.forget(sequence)
        self._masks.forget(sequence)
        self._pooler.forget(sequence)

    def _sample(self, computed: Computed, result: StepResult) -> None:
        items = [placed.item for placed in computed.placed if placed.samples]
        if not items:
            return
        masks, logits, draws = self._masks.take(), computed.logits, None
        if computed.likeliest is not None:
            draws = likeliest_draws(self._sampler, items, computed.likeliest.tokens, masks)
            if draws is None:
                logits = computed.likeliest.logits()
        if draws is None:
            assert logits is not None, "the executor returns logits or the likeliest tokens"
            draws = draw_tokens(self._sampler, logits, items, masks, computed.added)
        for item, drawn in zip(items, draws, strict=True):
            result.draws[item.sequence] = drawn

    def _score(self, placed: Placed, hidden: torch.Tensor, result: StepResult) -> None:
        sequence = placed.item.sequence
        start = sequence.num_computed
        # The row of position p predicts the token at p + 1.
        end = min(start + placed.item.num_new, sequence.prompt_end - 1)
        # The last virtual position predicts the first prompt token, which has no logprob because no
        # text precedes it.
        skipped = max(sequence.num_virtual - start, 0)
        out = result.prompt_logprobs.setdefault(sequence, [])
        for low in range(start + skipped, end, _PROMPT_LOGIT_ROWS):
            high = min(low + _PROMPT_LOGIT_ROWS, end)
            first = placed.row_start + low - start
            logits = self._executor.logits(sequence, hidden[first : first + high - low])
            # Copy to the host at once: scoring reads every row.
            rows = row_log_softmax(logits).cpu()
            targets = sequence.tokens[low + 1 : high + 1]
            position = low + 1 - sequence.num_virtual
            out.extend(self._scored(rows, targets, position, sequence.request.options.top_n))

    @staticmethod
    def _scored(
        rows: torch.Tensor, targets: list[int], position: int, top_n: int
    ) -> Iterable[PromptLogprob]:
        found = rows.gather(1, torch.tensor(targets).unsqueeze(1))[:, 0].tolist()
        tops = tops_of(rows, top_n)
        for offset, (token, logprob, top) in enumerate(zip(targets, found, tops, strict=True)):
            yield PromptLogprob(position + offset, Draw(token, logprob, top))
