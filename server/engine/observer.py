"""Reports the engine's steps to the metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from turret.server.adapters.adapter import AdapterRef, Mix
from turret.server.engine.answer import Answer
from turret.server.engine.scheduling.scheduler import Scheduler
from turret.server.engine.scheduling.sequence import Sequence, Step
from turret.server.engine.step.runner import StepResult
from turret.server.errors import TurretError

# Interfaces that the engine needs of its neighbours; tests implement their own.


class Runs(Protocol):
    """The interface of a runner that the engine uses."""

    def run(self, step: Step) -> StepResult: ...
    def forget(self, sequence: Sequence) -> None: ...
    def forget_adapter(self, key: str) -> None: ...
    def refusal(self, sequence: Sequence) -> TurretError | None: ...
    @property
    def adapter_bytes(self) -> int: ...


class Adapters(Protocol):
    """The interface of the adapter registry that the engine uses."""

    on_force_unload: list[Callable[[str], None]]
    on_unloaded: Callable[[str], None] | None

    def acquire(self, refs: SequenceOf[AdapterRef]) -> Mix: ...
    def release(self, mix: Mix) -> None: ...


class EngineMetrics(Protocol):
    """The part of the server's metrics that the engine feeds."""

    def queued(self, seconds: float) -> None: ...
    def first_token(self, seconds: float, adapter_names: SequenceOf[str]) -> None: ...
    def inter_token(self, seconds: float, adapter_names: SequenceOf[str]) -> None: ...
    def step(self, phase: str, *, seconds: float, num_tokens: int, num_adapters: int) -> None: ...
    def sequences(self, **counts: int) -> None: ...
    def kv_blocks(self, **counts: int) -> None: ...
    def kv_cache(self, *, block_size: int, num_blocks: int) -> None: ...
    def adapters_in_use(
        self, *, most: int, running: Iterable[str], waiting: Iterable[str]
    ) -> None: ...
    def preempted(self, count: int) -> None: ...
    def speculation(self, *, num_draft: int, num_accepted: int) -> None: ...
    def prefix_cache(self, *, hit: int, miss: int) -> None: ...
    def adapter_bytes(self, **counts: int) -> None: ...


# How old the lists of adapters in use may be: a thousand waiting requests are not walked each step.
_LISTED_SECONDS = 0.25


class LoopObserver:
    """Reads the engine thread's state and feeds the metrics; changes nothing but time stamps.

    Args:
        scheduler: The scheduler whose sequences and blocks are counted.
        runner: The runner whose adapter bytes are reported.
        metrics: Counts.
    """

    def __init__(self, scheduler: Scheduler, runner: Runs, metrics: EngineMetrics) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._metrics = metrics
        self._listed_at = 0.0
        blocks = scheduler.blocks
        # The first block holds padding.
        metrics.kv_cache(block_size=blocks.block_size, num_blocks=blocks.num_blocks - 1)
        # Publish an idle state before the first step.
        self.state()

    def preempted(self, count: int) -> None:
        """Count the sequences that gave up their blocks in one step."""
        if count:
            self._metrics.preempted(count)

    def scheduled(self, sequence: Sequence, now: float) -> None:
        """Record that a sequence is part of the step that begins, and the time of its first one."""
        if sequence.scheduled_at is None:
            sequence.scheduled_at = now
            self._metrics.queued(now - sequence.arrival)
            hit = sequence.num_cached
            self._metrics.prefix_cache(hit=hit, miss=sequence.num_prompt - hit)

    def tokens(self, answer: Answer, count: int, now: float) -> None:
        """Record the tokens of a request in one step, which share the time since its last token."""
        sequence = answer.sequence
        names = [adapter.name for adapter, _ in sequence.mix.members]
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            self._metrics.first_token(now - sequence.arrival, names)
        elif answer.last_token_at is not None:
            for _ in range(count):
                self._metrics.inter_token((now - answer.last_token_at) / count, names)
        answer.last_token_at = now

    def step(self, step: Step, result: StepResult, seconds: float) -> None:
        """Record the end of a step."""
        new = [item.num_new for item in step.scheduled]
        decodes = sum(n == 1 for n in new)
        phase = "decode" if decodes == len(new) else "prefill" if decodes == 0 else "mixed"
        adapters = {(u, g) for item in step.scheduled for u, g, _ in item.sequence.mix.key}
        num_rows = sum(item.num_rows for item in step.scheduled)
        self._metrics.step(phase, seconds=seconds, num_tokens=num_rows, num_adapters=len(adapters))
        num_draft = num_rows - sum(new)
        if num_draft:
            right = [len(result.draws[s.sequence]) - 1 for s in step.scheduled if s.draft]
            self._metrics.speculation(num_draft=num_draft, num_accepted=sum(right))
        self.state()

    def state(self) -> None:
        """Report the current sequences, blocks, adapters in use and bytes of adapters."""
        blocks = self._scheduler.blocks
        self._metrics.sequences(
            waiting=len(self._scheduler.waiting), running=len(self._scheduler.running)
        )
        self.adapter_bytes()
        self._metrics.kv_blocks(
            free=blocks.num_free - blocks.num_cached,
            cached=blocks.num_cached,
            used=blocks.num_active,
        )

        self._list_adapters()

    def _list_adapters(self) -> None:
        """Report the adapters of running and waiting requests, regularly and after the last one."""
        scheduler, now = self._scheduler, time.monotonic()
        if scheduler.has_work and now < self._listed_at + _LISTED_SECONDS:
            return
        self._listed_at = now
        self._metrics.adapters_in_use(
            most=scheduler.max_num_seqs,
            running=_names(scheduler.running),
            waiting=_names(scheduler.waiting),
        )

    def adapter_bytes(self) -> None:
        """Report the device memory that adapters take."""
        self._metrics.adapter_bytes(device=self._runner.adapter_bytes)


def _names(sequences: Iterable[Sequence]) -> set[str]:
    return {adapter.name for sequence in sequences for adapter, _ in sequence.mix.members}
