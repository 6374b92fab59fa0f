"""Reports the engine's steps to the metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator

from turret.server.engine.answer import Answer
from turret.server.engine.scheduling.scheduler import Scheduler
from turret.server.engine.scheduling.sequence import Sequence, Step
from turret.server.engine.step.runner import StepResult
from turret.server.metrics import Metrics

# Maximum age of the reported lists of adapters in use. Building the lists in every step would be
# slow, because a thousand requests may be waiting.
_LISTED_SECONDS = 0.25


class LoopObserver:
    """Reports the engine thread's state to the metrics; changes nothing but time stamps.

    Args:
        scheduler: The scheduler whose sequences and blocks are counted.
        metrics: The metrics to update.
    """

    def __init__(self, scheduler: Scheduler, metrics: Metrics) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._listed_at = 0.0
        # The number of gaps between tokens, by duration and adapters, which most requests of a step
        # share.
        self._gaps: Counter[tuple[float, tuple[str, ...]]] = Counter()
        blocks = scheduler.blocks
        # The first block is padding.
        sizes = str(blocks.block_size), str(blocks.num_blocks - 1)
        metrics.kv_cache_info.labels(*sizes).set(1)
        # Publish an idle state before the first step.
        self.state()

    def scheduled(self, sequence: Sequence, now: float) -> None:
        """Record that a sequence is part of the coming step, and the time of its first step."""
        if sequence.scheduled_at is None:
            sequence.scheduled_at = now
            self._metrics.queue_seconds.observe(now - sequence.arrival)
            found = sequence.num_cached
            self._metrics.prefix_tokens.labels("hit").inc(found)
            self._metrics.prefix_tokens.labels("miss").inc(sequence.num_prompt - found)

    def tokens(self, answer: Answer, count: int, now: float) -> None:
        """Record a request's tokens in one step, which share the time since its last token."""
        sequence = answer.sequence
        names = tuple([adapter.name for adapter, _ in sequence.mix.members])
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            self._metrics.first_token(now - sequence.arrival, names)
        elif answer.last_token_at is not None:
            self._gaps[(now - answer.last_token_at) / count, names] += count
        answer.last_token_at = now

    def handed_out(self) -> None:
        """Report the gaps between the tokens that ``tokens`` has recorded."""
        for (seconds, names), count in self._gaps.items():
            self._metrics.inter_token(seconds, names, count)
        self._gaps.clear()

    def step(self, step: Step, result: StepResult, seconds: float) -> None:
        """Record the end of a step."""
        adapters = set[tuple[str, int]]()
        decodes = num_new = num_draft = 0
        for item in step.scheduled:
            decodes += item.num_new == 1
            num_new += item.num_new
            num_draft += len(item.draft)
            adapters.update((uuid, generation) for uuid, generation, _ in item.sequence.group)
        count = len(step.scheduled)
        phase = "decode" if decodes == count else "prefill" if decodes == 0 else "mixed"
        self._metrics.step_seconds.labels(phase).observe(seconds)
        self._metrics.step_tokens.observe(num_new + num_draft)
        self._metrics.step_adapters.observe(len(adapters))
        if num_draft:
            right = [len(result.draws[s.sequence]) - 1 for s in step.scheduled if s.draft]
            self._metrics.draft_tokens.inc(num_draft)
            self._metrics.accepted_tokens.inc(sum(right))
        self.state()

    def state(self) -> None:
        """Report the current sequences, blocks and adapters in use."""
        blocks = self._scheduler.blocks
        self._metrics.sequences(
            waiting=len(self._scheduler.waiting), running=len(self._scheduler.running)
        )
        self._metrics.kv_blocks(
            free=blocks.num_free - blocks.num_cached,
            cached=blocks.num_cached,
            used=blocks.num_active,
        )

        self._list_adapters()

    def _list_adapters(self) -> None:
        """Report the adapters of all requests, at intervals and when no work is left."""
        scheduler, now = self._scheduler, time.monotonic()
        if scheduler.has_work and now < self._listed_at + _LISTED_SECONDS:
            return
        self._listed_at = now
        self._metrics.adapters_in_use(
            most=scheduler.max_num_seqs,
            running=_names(scheduler.running),
            waiting=_names(scheduler.waiting),
        )


def _names(sequences: Iterable[Sequence]) -> Iterator[str]:
    return (adapter.name for sequence in sequences for adapter, _ in sequence.mix.members)
