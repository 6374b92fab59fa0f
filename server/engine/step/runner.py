"""Runs a scheduled step and draws its tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch

from turret.kernels.rows.elementwise import row_log_softmax
from turret.server.adapters.device.store import Resident
from turret.server.basics.work import is_out_of_memory
from turret.server.engine.scheduling.sequence import Sequence, Step
from turret.server.engine.step.executor import Computed, Executor
from turret.server.engine.step.masks import Masks
from turret.server.engine.step.pooler import Pooler
from turret.server.engine.step.rows import Placed
from turret.server.engine.step.sampler import Draw, tops_of
from turret.server.engine.step.verification import draw_tokens, likeliest_draws
from turret.server.errors import BudgetExceededError
from turret.server.words import say

# Vocabulary logits of prompt positions are made this many rows at a time: 64 rows of a 150,000
# token vocabulary are 38 MB in fp32.
_PROMPT_LOGIT_ROWS = 64


class DeviceFullError(Exception):
    """The device had no memory for a step. Nothing was drawn; its keys and values are unknown."""


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """Logprob of the prompt token at ``position`` (from 0), given those before it."""

    position: int
    draw: Draw


@dataclass(slots=True)
class StepResult:
    """What a step produced: the tokens drawn, prompt logprobs, pooled states, by sequence.

    Those of a sequence with a draft are the tokens of it that were right, and one more.
    """

    draws: dict[Sequence, SequenceOf[Draw]] = field(default_factory=dict)
    prompt_logprobs: dict[Sequence, list[PromptLogprob]] = field(default_factory=dict)
    pooled: dict[Sequence, array[float]] = field(default_factory=dict)


class Runner:
    """Owns what computes steps, and the sampler. One thread only."""

    def __init__(self, executor: Executor, stop_token_ids: frozenset[int]) -> None:
        self._executor = executor
        self._store = executor.store
        self._sampler = executor.sampler(stop_token_ids)
        self._masks = Masks(stop_token_ids, is_late=self._sampler.takes_late_masks)
        self._pooler = Pooler()
        # Adapter key → bytes on the device. Cached because it is summed over every module.
        self._needs: dict[str, tuple[int, ...]] = {}

    def run(self, step: Step) -> StepResult:
        """Compute a step. Keys and values of its tokens are in the cache afterwards.

        Raises:
            DeviceFullError: Not even with what could be freed; a smaller step may succeed.
            AdapterMemoryError: There is no memory for an adapter.
        """
        reason = ""
        for _ in range(2):
            try:
                return self._compute(step)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            # Free memory outside the except block: the exception keeps the step's tensors alive.
            self._executor.free_memory()
        raise DeviceFullError(reason)

    def _compute(self, step: Step) -> StepResult:
        self._masks.begin([item.sequence for item in step.scheduled if item.samples])
        with torch.inference_mode():
            computed = self._executor.run(step)
            self._executor.look_ahead()
            result = StepResult()
            self._sample(computed, result)
            for placed in computed.placed:
                if placed.item.sequence.request.wants_prompt_logprobs:
                    self._score(placed, computed.hidden, result)
            result.pooled = self._pooler.pool(computed.placed, computed.hidden)
            return result

    def fits(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Whether a sequence's adapters, which are in host memory, fit beside the running ones."""
        return self._missing((sequence, *running)) is None

    def is_near(self, sequence: Sequence) -> bool:
        """Whether a sequence's adapters, which are in host memory, are on the device or almost.

        Copies of those that are not run beside the steps of others.
        """
        # Ask every adapter before ``all``, so that their copies run in parallel.
        near = [self._store.is_near(adapter) for adapter, _ in sequence.mix.members]
        return all(near)

    def refusal(self, sequence: Sequence) -> BudgetExceededError | None:
        """Why a sequence could not even run alone, or not now; or None."""
        if any(self._store.is_refused(adapter.key) for adapter, _ in sequence.mix.members):
            return BudgetExceededError(say("DEVICE_MEMORY_SHORT"))
        missing = self._missing((sequence,))
        if missing is None:
            return None
        needed, budget = missing
        return BudgetExceededError(say("MIX_TOO_LARGE", bytes=needed, budget_bytes=budget))

    def _missing(self, sequences: Iterable[Sequence]) -> tuple[int, int] | None:
        """What their adapters take when stored together, and the budget that this exceeds.

        Each counts once. None if there is room.
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

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapters on the device."""
        return self._store.adapter_bytes

    def forget_adapter(self, key: str) -> None:
        """Drop an adapter that is gone."""
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
            draws = likeliest_draws(items, computed.likeliest.tokens, masks)
            if draws is None:
                logits = computed.likeliest.logits()
        if draws is None:
            assert logits is not None, "of every row that is drawn from"
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
