"""The engine: one thread that owns the device, behind an asyncio face that only awaits.

``submit`` checks a request, takes references on its adapters and posts it to the inbox. The thread
repeats: read the inbox, expire deadlines, schedule, run, hand out. Outputs of a whole step go to
the event loop in one call.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence as SequenceOf
from typing import Protocol

from turret.server.adapters.mix import HostResult, Mix
from turret.server.engine.detokenizer import Detokenizer, TextStream
from turret.server.engine.flight import Flight
from turret.server.engine.request import (
    AdapterRef,
    AdapterUse,
    FinishReason,
    Output,
    Request,
)
from turret.server.engine.runner import StepResult
from turret.server.engine.scheduler import Scheduler, Step
from turret.server.engine.sequence import Sequence, SequenceState
from turret.server.engine.stream import Stream
from turret.server.errors import (
    AdapterUnloadedError,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    TurretError,
    UnavailableError,
)

_log = logging.getLogger(__name__)
_RETRY_SECONDS = 1.0


class Runs(Protocol):
    """What the engine needs of a runner (tests have their own)."""

    def run(self, step: Step) -> StepResult: ...
    def forget(self, sequence: Sequence) -> None: ...
    def forget_adapter(self, uuid: str) -> None: ...


class Adapters(Protocol):
    """What the engine needs of the adapter registry."""

    on_force_unload: Callable[[str], None] | None

    def acquire(self, refs: SequenceOf[AdapterRef]) -> Mix: ...
    def release(self, mix: Mix) -> None: ...


class Text(Protocol):
    """What the engine needs of the tokenizer."""

    vocab_size: int
    eos_token_ids: frozenset[int]

    def stream(self) -> TextStream: ...
    def token_text(self, token_id: int) -> str: ...


class EngineMetrics(Protocol):
    """The part of the server's metrics that the engine feeds."""

    def queued(self, seconds: float) -> None: ...
    def first_token(self, seconds: float) -> None: ...
    def inter_token(self, seconds: float) -> None: ...
    def step(self, phase: str, *, seconds: float, num_tokens: int, num_adapters: int) -> None: ...
    def sequences(self, **counts: int) -> None: ...
    def kv_blocks(self, **counts: int) -> None: ...
    def prefix_cache(self, *, hit: int, miss: int) -> None: ...


class Engine:
    """Runs requests on one model.

    Args:
        scheduler: Made for the same cache and adapters as ``runner``.
        runner: Computes steps.
        adapters: Resolves and holds adapters.
        text: The tokenizer.
        metrics: Counts.
        max_model_len: Most tokens (prompt and output) of one sequence.
        max_queued_requests: Most requests waiting; one more is refused.
        on_thread_start: Called first on the engine thread (thread counts and the like).

    Attributes:
        is_dead: The thread failed; nothing will be served any more.
        dead: Set on the event loop when that happens.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: Runs,
        adapters: Adapters,
        text: Text,
        metrics: EngineMetrics,
        max_model_len: int,
        max_queued_requests: int,
        on_thread_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._adapters = adapters
        self._text = text
        self._metrics = metrics
        self._max_queued_requests = max_queued_requests
        self._on_thread_start = on_thread_start
        blocks = scheduler.blocks
        self.max_model_len = min(max_model_len, (blocks.num_blocks - 1) * blocks.block_size)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox: list[tuple[Stream, Output | TurretError]] = []
        self._flights: dict[Sequence, Flight] = {}
        self._with_deadline: set[Flight] = set()
        self._ready: set[Sequence] = set()
        self._cold: dict[Sequence, HostResult] = {}
        self._draining = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        self._num_open = 0  # streams not ended, counted on the event loop
        self.is_dead = False
        self.dead = asyncio.Event()
        adapters.on_force_unload = lambda uuid: self._inbox.put(lambda: self._force_unload(uuid))

    # The asyncio side.

    async def start(self) -> None:
        """Start the thread; outputs will go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def submit(self, request: Request) -> Stream:
        """Take in a request.

        Raises:
            UnavailableError: Not started, draining or dead.
            QueueFullError: Too many requests wait.
            PromptTooLongError, InvalidRequestError: The request cannot run on this model.
            AdapterNotFoundError, BudgetExceededError: Its adapters cannot be used.
        """
        arrival = time.monotonic()
        if self.is_dead:
            raise UnavailableError("the engine has failed")
        if self._draining or self._thread is None:
            raise UnavailableError("the server is shutting down", retry_after_seconds=_RETRY_SECONDS)
        max_tokens = self._check(request)
        if len(self._scheduler.waiting) + self._inbox.qsize() >= self._max_queued_requests:
            raise QueueFullError(
                f"{self._max_queued_requests} requests are waiting already",
                metadata={"max_queued_requests": str(self._max_queued_requests)},
                retry_after_seconds=_RETRY_SECONDS,
            )
        mix = self._adapters.acquire(request.adapters)
        sequence = Sequence(request, mix, arrival)
        stream = Stream(lambda: self._inbox.put(lambda: self._cancel(sequence)))
        detokenizer = Detokenizer(
            self._text.stream(), request.stop.stop_strings, request.stop.include_stop
        )
        flight = Flight(
            sequence,
            stream,
            detokenizer,
            eos_token_ids=self._text.eos_token_ids,
            token_text=self._text.token_text,
            max_tokens=max_tokens,
        )
        self._num_open += 1
        self._idle.clear()
        self._inbox.put(lambda: self._add(flight))
        return stream

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new requests, let running ones finish, cancel what is left, stop the thread."""
        self._draining = True
        if self._thread is None:
            return
        if not self.is_dead:
            try:
                await asyncio.wait_for(self._idle.wait(), max(grace_seconds, 0.0))
            except TimeoutError:
                self._inbox.put(self._cancel_all)
                await self._idle.wait()
        self._inbox.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    def _check(self, request: Request) -> int:
        """The most tokens the request may generate."""
        prompt = len(request.prompt_token_ids)
        wrong = [t for t in request.prompt_token_ids if not 0 <= t < self._text.vocab_size]
        if wrong:
            raise InvalidRequestError.of(
                "input.token_ids", f"{wrong[0]} is not in the vocabulary of {self._text.vocab_size}"
            )
        for name, ids in (
            ("sampling.logit_bias", request.sampling.logit_bias),
            ("stop.stop_token_ids", request.stop.stop_token_ids),
        ):
            if any(not 0 <= t < self._text.vocab_size for t in ids):
                raise InvalidRequestError.of(
                    name, f"a token id is not in the vocabulary of {self._text.vocab_size}"
                )
        room = self.max_model_len - prompt
        wanted = request.stop.max_tokens
        if request.score:
            wanted, room = 0, room + 1
        if room < (1 if wanted is None else wanted) or room < 1:
            asked = "" if wanted is None else f" + max_tokens {wanted}"
            raise PromptTooLongError(
                f"prompt of {prompt} tokens{asked} exceeds the context of {self.max_model_len}",
                metadata={"prompt_tokens": str(prompt), "max_model_len": str(self.max_model_len)},
                violations=[("input", "the prompt and stop.max_tokens exceed the context")],
            )
        return room if wanted is None else wanted

    def _deliver(self, outbox: list[tuple[Stream, Output | TurretError]]) -> None:
        for stream, item in outbox:
            stream.deliver(item)
            if isinstance(item, TurretError) or item.finish is not None:
                self._num_open -= 1
        if self._num_open == 0:
            self._idle.set()

    def _mark_dead(self) -> None:
        """The thread is gone: answer here what was posted too late for it."""
        self.dead.set()
        while not self._inbox.empty():
            self._inbox.get_nowait()()
        outbox, self._outbox = self._outbox, []
        self._deliver(outbox)

    # The engine thread.

    def _run(self) -> None:
        try:
            self._on_thread_start()
            while not self._stopping:
                self._read_inbox()
                self._expire(time.monotonic())
                self._flush()
                if not self._stopping:
                    self._step()
        except Exception:
            # Whatever state the device is in, limping on would risk wrong answers.
            _log.exception("the engine failed")
            self._die()

    def _read_inbox(self) -> None:
        """Run posted commands; wait for one if nothing can be computed."""
        if not self._scheduler.running and not self._ready:
            deadlines = [f.sequence.request.deadline for f in self._with_deadline]
            soonest = min((d for d in deadlines if d is not None), default=None)
            timeout = None if soonest is None else max(soonest - time.monotonic(), 0.0)
            try:
                self._inbox.get(timeout=timeout)()
            except queue.Empty:
                return
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()

    def _step(self) -> None:
        start = time.monotonic()
        step = self._scheduler.schedule()
        if step.num_preempted:
            self._ready.update(s for s in self._scheduler.waiting if s.num_preemptions > 0)
        if not step.scheduled:
            return
        for item in step.scheduled:
            self._note_scheduled(item.sequence, start)
        result = self._runner.run(step)
        self._scheduler.complete(step)
        now = time.monotonic()
        for item in step.scheduled:
            flight = self._flights.get(item.sequence)
            if flight is not None:
                self._advance(flight, result, now)
        self._flush()
        self._report(step, now - start)

    def _note_scheduled(self, sequence: Sequence, now: float) -> None:
        self._ready.discard(sequence)
        if sequence.scheduled_at is None:
            sequence.scheduled_at = now
            self._metrics.queued(now - sequence.arrival)
            hit = sequence.num_cached
            self._metrics.prefix_cache(hit=hit, miss=sequence.num_prompt - hit)

    def _advance(self, flight: Flight, result: StepResult, now: float) -> None:
        """Hand out what a step produced for one request."""
        sequence = flight.sequence
        scored = result.prompt_logprobs.get(sequence)
        if scored is not None:
            flight.add_prompt_logprobs(scored)
        draw = result.draws.get(sequence)
        if draw is None:
            if sequence.request.score and sequence.num_computed == sequence.num_prompt:
                output = Output(prompt_logprobs=flight.take_prompt_logprobs())
                self._end(flight, FinishReason.STOP, None, output, now)
            return
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            self._metrics.first_token(now - sequence.arrival)
        elif flight.last_token_at is not None:
            self._metrics.inter_token(now - flight.last_token_at)
        flight.last_token_at = now
        output, reason, stop = flight.accept(draw)
        if reason is None:
            self._outbox.append((flight.stream, output))
        else:
            self._end(flight, reason, stop, output, now)

    def _add(self, flight: Flight) -> None:
        sequence = flight.sequence
        self._flights[sequence] = flight
        if sequence.request.deadline is not None:
            self._with_deadline.add(flight)
        if self._stopping or self.is_dead:
            self._fail(flight, UnavailableError("the server is shutting down"))
            return
        self._scheduler.add(sequence)
        try:
            resident = sequence.mix.ensure_host(
                lambda result: self._inbox.put(lambda: self._loaded(sequence, result))
            )
        except TurretError as error:
            self._fail(flight, error)
            return
        if resident:
            self._ready.add(sequence)

    def _loaded(self, sequence: Sequence, result: HostResult) -> None:
        flight = self._flights.get(sequence)
        if flight is None:
            return
        if result.error is not None:
            self._fail(flight, result.error)
            return
        self._cold[sequence] = result
        self._ready.add(sequence)

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence's adapters are resident (the scheduler asks)."""
        return sequence in self._ready

    def _cancel(self, sequence: Sequence) -> None:
        flight = self._flights.get(sequence)
        if flight is not None:
            self._cut(flight, FinishReason.CANCELLED, time.monotonic())

    def _cancel_all(self) -> None:
        for sequence in list(self._flights):
            self._cancel(sequence)

    def _expire(self, now: float) -> None:
        for flight in list(self._with_deadline):
            deadline = flight.sequence.request.deadline
            if deadline is not None and deadline <= now:
                self._cut(flight, FinishReason.DEADLINE, now)

    def _cut(self, flight: Flight, reason: FinishReason, now: float) -> None:
        self._end(flight, reason, None, Output(text=flight.flush()), now)

    def _force_unload(self, uuid: str) -> None:
        for flight in list(self._flights.values()):
            if any(uuid == member for member, _, _ in flight.sequence.mix.key):
                error = AdapterUnloadedError(
                    "an adapter of this request was unloaded by force", metadata={"uuid": uuid}
                )
                self._fail(flight, error)
        self._flush()

    def _end(
        self, flight: Flight, reason: FinishReason, stop: str | int | None, output: Output, now: float
    ) -> None:
        finish = flight.finish(reason, stop, self._uses(flight.sequence), now)
        last = Output(
            text=output.text,
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            finish=finish,
        )
        self._outbox.append((flight.stream, last))
        self._let_go(flight)

    def _fail(self, flight: Flight, error: TurretError) -> None:
        self._outbox.append((flight.stream, error))
        self._let_go(flight)

    def _let_go(self, flight: Flight) -> None:
        """Free everything a request holds."""
        sequence = flight.sequence
        del self._flights[sequence]
        self._with_deadline.discard(flight)
        self._ready.discard(sequence)
        self._cold.pop(sequence, None)
        if sequence.state is not SequenceState.FINISHED and (
            sequence.state is SequenceState.RUNNING or sequence in self._scheduler.waiting
        ):
            self._scheduler.finish(sequence)
        self._runner.forget(sequence)
        self._adapters.release(sequence.mix)

    def _uses(self, sequence: Sequence) -> tuple[AdapterUse, ...]:
        cold = self._cold.get(sequence)
        seconds = {} if cold is None else cold.load_seconds
        return tuple(
            AdapterUse(
                name=adapter.name,
                uuid=adapter.uuid,
                generation=adapter.generation,
                weight=weight,
                cold_start=adapter.uuid in seconds,
                load_ms=1000.0 * seconds.get(adapter.uuid, 0.0),
            )
            for adapter, weight in sequence.mix.components
        )

    def _flush(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._call(lambda: self._deliver(outbox))

    def _call(self, function: Callable[[], None]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    def _report(self, step: Step, seconds: float) -> None:
        new = [item.num_new for item in step.scheduled]
        decodes = sum(n == 1 for n in new)
        phase = "decode" if decodes == len(new) else "prefill" if decodes == 0 else "mixed"
        adapters = {u for item in step.scheduled for u, _, _ in item.sequence.mix.key}
        self._metrics.step(
            phase, seconds=seconds, num_tokens=sum(new), num_adapters=len(adapters)
        )
        self._report_state()

    def _report_state(self) -> None:
        blocks = self._scheduler.blocks
        self._metrics.sequences(
            waiting=len(self._scheduler.waiting), running=len(self._scheduler.running)
        )
        self._metrics.kv_blocks(
            free=blocks.num_free - blocks.num_cached,
            cached=blocks.num_cached,
            used=blocks.num_active,
        )

    def _stop(self) -> None:
        self._cancel_all()
        self._stopping = True

    def _die(self) -> None:
        self.is_dead = True
        for flight in list(self._flights.values()):
            self._outbox.append((flight.stream, UnavailableError("the engine has failed")))
            self._adapters.release(flight.sequence.mix)
        self._flights.clear()
        self._flush()
        self._call(self._mark_dead)
