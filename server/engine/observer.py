"""What the metrics are told of the engine's steps."""

from __future__ import annotations

from turret.server.engine.answer import Answer
from turret.server.engine.ports import EngineMetrics, Runs
from turret.server.engine.scheduling.scheduler import Scheduler, Step
from turret.server.engine.scheduling.sequence import Sequence


class LoopObserver:
    """Reads the engine thread's state and feeds the metrics; changes nothing but time stamps.

    Args:
        scheduler: Whose sequences and blocks are counted.
        runner: Whose adapter bytes are reported.
        metrics: Counts.
    """

    def __init__(self, scheduler: Scheduler, runner: Runs, metrics: EngineMetrics) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._metrics = metrics

    def preempted(self, count: int) -> None:
        """So many sequences gave up their blocks in one step."""
        if count:
            self._metrics.preempted(count)

    def scheduled(self, sequence: Sequence, now: float) -> None:
        """A sequence is part of the step that begins; stamps its first one."""
        if sequence.scheduled_at is None:
            sequence.scheduled_at = now
            self._metrics.queued(now - sequence.arrival)
            hit = sequence.num_cached
            self._metrics.prefix_cache(hit=hit, miss=sequence.num_prompt - hit)

    def token(self, answer: Answer, now: float) -> None:
        """A request has got a token; stamps it."""
        sequence = answer.sequence
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            self._metrics.first_token(now - sequence.arrival)
        elif answer.last_token_at is not None:
            self._metrics.inter_token(now - answer.last_token_at)
        answer.last_token_at = now

    def step(self, step: Step, seconds: float) -> None:
        """A step has ended."""
        new = [item.num_new for item in step.scheduled]
        decodes = sum(n == 1 for n in new)
        phase = "decode" if decodes == len(new) else "prefill" if decodes == 0 else "mixed"
        adapters = {(u, g) for item in step.scheduled for u, g, _ in item.sequence.mix.key}
        self._metrics.step(phase, seconds=seconds, num_tokens=sum(new), num_adapters=len(adapters))
        self.state()

    def state(self) -> None:
        """What is there now: sequences, blocks, bytes of adapters."""
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

    def adapter_bytes(self) -> None:
        """What adapters take of the device's memory."""
        self._metrics.adapter_bytes(device=self._runner.adapter_bytes)
