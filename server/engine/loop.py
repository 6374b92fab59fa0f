"""The engine thread's loop: reads commands, ends expired requests, schedules and runs steps.

Everything here belongs to the engine thread. Other threads post commands to it with ``post``. The
loop passes all outputs of a step to the event loop in one call of ``send``.
"""

from __future__ import annotations

import functools
import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from turret.server import log
from turret.server.adapters.adapter import HostResult, Mix, template_of
from turret.server.adapters.base import ChangedBase
from turret.server.adapters.device import AdapterMemoryError
from turret.server.adapters.registry import AdapterRegistry
from turret.server.basics.work import turret_error
from turret.server.engine.answer import Answer, Stream, uses_of
from turret.server.engine.observer import LoopObserver
from turret.server.engine.scheduling.request import FinishReason, Output, Request
from turret.server.engine.scheduling.scheduler import Scheduler
from turret.server.engine.scheduling.sequence import Scheduled, Sequence, SequenceState, Step
from turret.server.engine.step.runner import DeviceFullError, Runner, StepResult
from turret.server.errors import (
    AdapterClassifiesError,
    AdapterMergedError,
    AdapterUnloadedError,
    BudgetExceededError,
    HeadMissingError,
    InvalidRequestError,
    TurretError,
    UnavailableError,
)
from turret.server.metrics import Metrics
from turret.server.words import say

# The check that a request and its adapters agree on a classification head.


def check_heads(request: Request, mix: Mix) -> None:
    """Reject a request for which the mix's adapters were not trained.

    Raises:
        InvalidRequestError: Classifying requires exactly one adapter with a head; generating and
            scoring require that none has one.
    """
    names = [adapter.name for adapter, _ in mix.members if adapter.head is not None]
    if request.classifies:
        if len(names) == 1:
            return
        if names:
            raise InvalidRequestError.of(
                "adapters", say("SEVERAL_HEADS", adapters=", ".join(names))
            )
        raise HeadMissingError.of("adapters", say("HEAD_MISSING"))
    if names and request.pooling is None:
        said = say("ADAPTER_CLASSIFIES", adapters=", ".join(names))
        raise AdapterClassifiesError.of("adapters", said)


# The check that a request was tokenised with the vocabulary and chat template of its adapters.


def check_vocabulary(request: Request, mix: Mix) -> int:
    """Reject a request whose tokens do not come from the tokenizer of its adapters.

    Returns:
        The number of logits of the model with these adapters; 0 for the base's number.

    Raises:
        InvalidRequestError: Several adapters have their own vocabulary. Or one does and its weight
            is not 1: the base has no row with which a new token's row could be weighted. Or such
            an adapter is combined with one that leaves a part of the computation to the base.
        UnavailableError: An adapter has been replaced since the request was tokenised.
    """
    own = [(a, weight) for a, weight in mix.members if a.facts.vocab_size]
    made_by = ("", "") if request.own_tokenizer is None else request.own_tokenizer.content
    if len(own) > 1 or any(weight != 1.0 for _, weight in own):
        names = ", ".join(adapter.name for adapter, _ in own)
        raise InvalidRequestError.of("adapters", say("VOCABULARY_NOT_ALONE", adapters=names))
    if own and (partial := _parts_of_the_base(mix)):
        said = say("VOCABULARY_WITH_PARTIAL", adapter=own[0][0].name, partial=partial)
        raise InvalidRequestError.of("adapters", said)
    digest = own[0][0].facts.tokenizer if own else ""
    if made_by != (digest, template_of(adapter.facts for adapter, _ in mix.members)):
        raise UnavailableError(say("TOKENIZER_REPLACED"))
    return own[0][0].facts.vocab_size if own else 0


def _parts_of_the_base(mix: Mix) -> str:
    """The name of an adapter that leaves a part of the computation to the base; empty without one.

    The base alone computes the keys and values before an invocation and in a first pass, and all
    requests share them.
    """
    found = (a.name for a, _ in mix.members if a.facts.invocation or a.facts.first_pass)
    return next(found, "")


# A change of the base weights that waits until no request runs.


BaseSwap = Callable[[], ChangedBase]


class BaseChange:
    """One change of the base's weights, made at most once, on the engine thread.

    Args:
        change: Changes the model's weights.

    Attributes:
        outcome: Done when the engine continues with the new weights; UnavailableError if the engine
            ends first. Cancelling it before the change begins withdraws the change.
    """

    def __init__(self, change: BaseSwap) -> None:
        self.outcome: Future[None] = Future()
        self._change = change

    @property
    def is_withdrawn(self) -> bool:
        return self.outcome.cancelled()

    def make(self) -> ChangedBase | None:
        """Change the weights; None if the change was withdrawn.

        An error in ``change`` is a failure of the engine: the state of the weights is then unknown.
        """
        if not self.outcome.set_running_or_notify_cancel():
            return None
        try:
            return self._change()
        except BaseException:
            self.outcome.set_exception(UnavailableError(say("ENGINE_FAILED")))
            raise

    def complete(self) -> None:
        """Record that the engine has adopted the change."""
        self.outcome.set_result(None)

    def refuse(self) -> None:
        """Record that the engine ended before the change could be made."""
        if self.outcome.set_running_or_notify_cancel():
            self.outcome.set_exception(UnavailableError(say("SHUTTING_DOWN")))


_log = logging.getLogger(__name__)

Outbox = list[tuple[Stream, Output | TurretError]]

# Work that yields to requests, such as training. It is called on the engine thread. Its argument is
# a function that it must call at least every few milliseconds; steps of requests run inside that
# call.
Background = Callable[[Callable[[], None]], None]
# The share of the time that background work gets while requests run.
_BACKGROUND_SHARE = 0.15
# Maximum time that background work can owe to requests. Without this limit, background work would
# wait too long after a part that took long.
_MOST_OWED_SECONDS = 10.0


class StoppedError(Exception):
    """The engine is stopping, so background work must end."""


class EngineFailedError(BaseException):
    """A step of requests failed within background work, which must not catch this error."""


# Maximum time to wait for a command before looking again. A lock rejects timeouts of 292 years or
# more, and a deadline may be that far away.
_MAX_WAIT_SECONDS = 3600.0


class EngineLoop:
    """Runs requests to their end.

    Args:
        scheduler: Made for the same cache and adapters as ``runner``.
        runner: Computes steps.
        adapters: Holds adapters until their requests end.
        metrics: The metrics to update.
        send: Hands outputs to the event loop; callable from the engine thread.
        allow_merged_twice: Whether requests may name adapters that are part of the base.

    Attributes:
        is_dead: Whether the loop has failed. Nothing is served after that.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: Runner,
        adapters: AdapterRegistry,
        metrics: Metrics,
        send: Callable[[Outbox], None],
        allow_merged_twice: bool = False,
    ) -> None:
        self.is_dead = False
        self._scheduler = scheduler
        self._runner = runner
        self._adapters = adapters
        self._observer = LoopObserver(scheduler, metrics)
        self._preemptions = metrics.preemptions
        self._send = send
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox: Outbox = []
        # Answers with new tokens that are not handed out yet, the number of these tokens, and the
        # time of their step.
        self._later: list[tuple[Answer, int, float]] = []
        self._broken: list[tuple[Answer, Exception]] = []
        # Reports the last step to the metrics, if that has not been done yet.
        self._report: Callable[[], None] | None = None
        self._answers: dict[Sequence, Answer] = {}
        self._with_deadline: set[Answer] = set()
        # The requests whose adapters are in host memory, and since when.
        self._ready: dict[Sequence, float] = {}
        self._cold: dict[Sequence, HostResult] = {}
        # The tenants of the requests in the inbox, in order.
        self._posted: deque[bytes] = deque()
        self._has_work = False
        self._stopping = False
        self._background: deque[Background] = deque()
        self._between = _Between(self, metrics)
        self._change: BaseChange | None = None
        self._allow_merged_twice = allow_merged_twice
        # Uuids of the adapters that are part of the base, and digests of their weights, because
        # adapters with other names may have the same weights.
        self._merged: frozenset[str] = frozenset()

    # The methods below may be called from any thread, except ``submit``.

    def post(self, command: Callable[[], None]) -> None:
        """Post a command for the engine thread to run between two steps."""
        self._inbox.put(command)

    def post_background(self, work: Background) -> None:
        """Post work that runs while no request does, and otherwise for a small share of time."""
        self._inbox.put(lambda: self._background.append(work))

    @property
    def num_waiting(self) -> int:
        """Number of waiting requests, including those that the loop has not read yet."""
        return len(self._scheduler.waiting) + len(self._posted)

    def num_waiting_of(self, tenant: bytes) -> int:
        """Number of waiting requests of one tenant."""
        return self._scheduler.waiting.num_waiting(tenant) + self._posted.count(tenant)

    def submit(self, answer: Answer) -> None:
        """Post a request. Always call this from the same thread."""

        def take() -> None:
            self.add(answer)
            self._posted.popleft()

        self._posted.append(answer.sequence.tenant)
        self.post(take)

    @property
    def is_ending(self) -> bool:
        """Whether the engine is stopping, so that nothing new will be computed."""
        return self._stopping or self.is_dead

    # Commands, which other threads post.

    def add(self, answer: Answer) -> None:
        """Accept a request."""
        sequence = answer.sequence
        self._answers[sequence] = answer
        if sequence.request.deadline is not None:
            self._with_deadline.add(answer)
        if self._stopping or self.is_dead:
            self._fail(answer, UnavailableError(say("SHUTTING_DOWN")))
            return

        def enter() -> None:
            self._check_not_merged(sequence)
            self._scheduler.add(sequence)
            self._await_adapters(answer)

        self._guard(answer, enter)

    def cancel(self, sequence: Sequence) -> None:
        """End a request early, if it still runs."""
        answer = self._answers.get(sequence)
        if answer is not None:
            self._cut(answer, FinishReason.CANCELLED, time.monotonic())

    def cancel_all(self) -> None:
        """End every request early."""
        for sequence in list(self._answers):
            self.cancel(sequence)

    def force_unload(self, uuid: str) -> None:
        """Fail every request that uses an adapter."""
        for answer in list(self._answers.values()):
            if any(uuid == member for member, _, _ in answer.sequence.mix.key):
                self._fail(answer, AdapterUnloadedError(say("ADAPTER_UNLOADED", uuid=uuid)))
        self._flush()

    def change_base(self, change: BaseChange) -> None:
        """Change the base weights once no request runs. Waiting requests stay in the queue."""
        if self._stopping or self.is_dead:
            change.refuse()
            return
        assert self._change is None, "one change at a time"
        self._change = change
        self._scheduler.is_draining = True

    def stop(self) -> None:
        """End every request and leave ``run``."""
        self.cancel_all()
        self._stopping = True
        self._refuse_change()

    # The loop.

    def run(self) -> None:
        """Serve until stopped. A failure ends every request and sets ``is_dead``."""
        try:
            while not self._stopping:
                self._read_inbox()
                self._expire(time.monotonic())
                self._try_change()
                self._flush()
                if not self._stopping:
                    self._step()
                if self._background and not self._stopping:
                    self._between.run(self._background.popleft())
        # BaseException includes panics of Rust libraries. If this thread died silently, callers
        # would wait forever.
        except BaseException:
            # The device's state is unknown, and continuing could give wrong answers.
            try:
                _log.exception("the engine failed")
            finally:
                # Even logging can fail, for example if memory has run out.
                self._die()

    def serve(self) -> bool:
        """Run a step of requests within background work, if there is one to run.

        Returns:
            Whether there may be another step to run.

        Raises:
            StoppedError: The engine is stopping.
            EngineFailedError: A step failed.
        """
        if not self._has_work and self._inbox.empty():
            return False
        try:
            self._read_inbox(waits=False)
            self._expire(time.monotonic())
            self._flush()
            if not self._stopping:
                self._step()
        except Exception as error:
            raise EngineFailedError from error
        if self._stopping:
            raise StoppedError
        return self._has_work

    def run_leftovers(self) -> None:
        """Run the commands that were posted after ``run`` ended; their callers wait for answers."""
        while not self._inbox.empty():
            self._inbox.get_nowait()()
        while self._background:
            self._between.run(self._background.popleft())
        self._flush()

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence's adapters are resident. The scheduler calls this."""
        return sequence in self._ready

    def _read_inbox(self, *, waits: bool = True) -> None:
        """Run posted commands; with ``waits``, wait for one if there was nothing to compute.

        Only a command or a deadline can create work. A sequence in the queue, even a ready one, may
        still have to wait for others.
        """
        if waits and not self._has_work and not self._background:
            deadlines = [f.sequence.request.deadline for f in self._with_deadline]
            soonest = min((d for d in deadlines if d is not None), default=None)
            timeout = None
            if soonest is not None:
                timeout = min(max(soonest - time.monotonic(), 0.0), _MAX_WAIT_SECONDS)
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

    def _try_change(self) -> None:
        """Make the pending change of the base if no request runs any more."""
        change = self._change
        if change is None or not (change.is_withdrawn or self._scheduler.is_drained):
            return
        self._change = None
        base = change.make()
        self._scheduler.is_draining = False
        if base is None:
            return
        self._scheduler.change_base(base.generation)
        for key in base.stale:
            self._runner.forget_adapter(key)
        self._merged = base.merged
        for answer in list(self._answers.values()):
            self._guard(answer, lambda answer=answer: self._check_not_merged(answer.sequence))
        for sequence in list(self._ready):
            if any(adapter.key in base.stale for adapter, _ in sequence.mix.members):
                del self._ready[sequence]
                answer = self._answers[sequence]
                self._guard(answer, lambda answer=answer: self._await_adapters(answer))
        change.complete()

    def _check_not_merged(self, sequence: Sequence) -> None:
        """Raises AdapterMergedError if a request would apply an adapter of the base twice."""
        if self._allow_merged_twice:
            return
        for adapter, weight in sequence.mix.members:
            if weight and not self._merged.isdisjoint((adapter.uuid, adapter.digest)):
                raise AdapterMergedError(say("MERGED_TWICE", adapter=adapter.name))

    def _refuse_change(self) -> None:
        if self._change is not None:
            self._change.refuse()
            self._change = None

    def _await_adapters(self, answer: Answer) -> None:
        """Let a request start once its adapters are resident, which may be now."""
        sequence = answer.sequence
        if sequence.mix.ensure_host(
            lambda result: self._inbox.put(lambda: self._loaded(sequence, result))
        ):
            self._make_ready(answer)

    def _yield_memory(self, now: float) -> bool:
        """Let one request take the memory of others' adapters, if the scheduler decides so."""
        wanting, num_running = self._adapters.wanting(), len(self._scheduler.running)
        found = self._scheduler.yield_memory(wanting, self._ready, now) if wanting else None
        if found is None:
            return False
        to, yielding = found
        self._preemptions.inc(num_running - len(self._scheduler.running))
        for sequence in yielding:
            del self._ready[sequence]
        self._adapters.hand_over([sequence.mix for sequence in yielding], to.mix)
        for sequence in yielding:
            answer = self._answers[sequence]
            self._guard(answer, functools.partial(self._await_adapters, answer))
        return True

    def _step(self) -> None:
        start = time.monotonic()
        has_yielded = self._yield_memory(start)
        step = self._scheduler.schedule(start)
        self._has_work = bool(step.scheduled) or step.num_preempted > 0 or has_yielded
        self._preemptions.inc(step.num_preempted)
        if not step.scheduled:
            self._hand_out()
            # Report again: a cancellation may have ended requests that the last report counted.
            self._observer.state()
            return
        for item in step.scheduled:
            self._observer.scheduled(item.sequence, start)
        try:
            result = self._runner.run(step, self._meanwhile)
        except DeviceFullError as error:
            self._abandon(step, str(error))
            return
        except AdapterMemoryError as error:
            self._abandon(step, str(error), error.key)
            return
        now = time.monotonic()
        self._scheduler.complete(step, now - start)
        self._fail_broken()
        for item in step.scheduled:
            answer = self._answers.get(item.sequence)
            if answer is not None:
                self._guard(answer, functools.partial(self._advance, answer, item, result, now))
        self._report = functools.partial(self._observer.step, step, result, now - start)
        if not self._runner.is_asynchronous:
            self._hand_out()
        self._flush()

    def _meanwhile(self) -> None:
        """Hand out and report the last step's tokens, while the device computes the next step.

        The last step filled ``_later`` (``_advance``) and set ``_report``; this method empties
        both. Requests that fail here go to ``_broken``, which ``_fail_broken`` empties once the
        next step is over. If no step is under way, ``_hand_out`` does all of this at once.
        """
        later, self._later = self._later, []
        for answer, count, now in later:
            try:
                output = self._output(answer, count, now, is_last=False)
                self._outbox.append((answer.stream, output))
            except Exception as error:
                # The sequence is part of the step, so it ends after the step.
                self._broken.append((answer, error))
        self._flush()
        if self._report is not None:
            self._report()
            self._report = None

    def _hand_out(self) -> None:
        """Hand out all tokens between two steps."""
        self._meanwhile()
        self._fail_broken()

    def _fail_broken(self) -> None:
        broken, self._broken = self._broken, []
        for answer, error in broken:
            self._fail_for(answer, error)

    def _abandon(self, step: Step, reason: str, key: str | None = None) -> None:
        """Continue after a step for which the device had no memory.

        Args:
            step: The step.
            reason: The reason to log.
            key: The adapter for which there was no memory; its requests end. If None, later steps
                are smaller.
        """
        num_preempted = self._scheduler.abandon(step, time.monotonic(), is_too_large=key is None)
        _log.warning("the device has no memory for a step", extra=log.fields(reason=reason))
        sequences = [item.sequence for item in step.scheduled]
        ended = [s for s in sequences if any(a.key == key for a, _ in s.mix.members)]
        if num_preempted is None:
            ended = sequences[:1]
        for sequence in ended:
            self._fail(self._answers[sequence], BudgetExceededError(say("DEVICE_MEMORY_SHORT")))
        if num_preempted is not None:
            self._preemptions.inc(num_preempted)

    def _advance(self, answer: Answer, item: Scheduled, result: StepResult, now: float) -> None:
        """Deliver the results of a step for one request."""
        sequence = answer.sequence
        scored = result.prompt_logprobs.get(sequence)
        if scored is not None:
            answer.add_prompt_logprobs(scored)
        draws = result.draws.get(sequence)
        if draws is None:
            is_whole = sequence.num_computed == sequence.prompt_end
            if is_whole and not sequence.request.generates:
                output = answer.of_prompt(result.pooled.get(sequence))
                self._end(answer, FinishReason.STOP, None, output, now)
            return
        count, reason, stop = answer.accept(draws)
        if item.draft:
            self._scheduler.accept(item, count - 1)
        if reason is None:
            self._later.append((answer, count, now))
        else:
            self._end(answer, reason, stop, self._output(answer, count, now, is_last=True), now)

    def _output(self, answer: Answer, count: int, now: float, *, is_last: bool) -> Output:
        self._observer.tokens(answer, count, now)
        return answer.output(self._cold.get(answer.sequence), is_last=is_last)

    def _loaded(self, sequence: Sequence, result: HostResult) -> None:
        answer = self._answers.get(sequence)
        if answer is None:
            return
        if result.error is not None:
            self._fail(answer, result.error)
            return
        self._cold[sequence] = result
        # Check again: the base may have changed meanwhile, and an adapter may be gone.
        self._guard(answer, lambda: self._await_adapters(answer))

    def _make_ready(self, answer: Answer) -> None:
        """Let a request run now that its adapters are in host memory; fail it if they never fit."""
        refusal = self._runner.refusal(answer.sequence)
        if refusal is None:
            self._ready[answer.sequence] = time.monotonic()
        else:
            self._fail(answer, refusal)

    def _expire(self, now: float) -> None:
        for answer in list(self._with_deadline):
            deadline = answer.sequence.request.deadline
            if deadline is not None and deadline <= now:
                self._cut(answer, FinishReason.DEADLINE, now)

    def _guard(self, answer: Answer, work: Callable[[], None]) -> None:
        """Run an action for one request: if it fails, only that request ends.

        Actions for several requests (scheduling, a step) are not guarded: after an error in one,
        the state of all requests is unreliable.
        """
        try:
            work()
        except Exception as error:
            self._fail_for(answer, error)

    def _fail_for(self, answer: Answer, error: Exception) -> None:
        if not isinstance(error, TurretError):
            request_id = answer.sequence.request.request_id
            _log.error("a request failed", exc_info=error, extra=log.fields(request_id=request_id))
            error = turret_error(error)
        if answer.sequence in self._answers:
            self._fail(answer, error)

    def _cut(self, answer: Answer, reason: FinishReason, now: float) -> None:
        self._hand_out()

        def cut() -> None:
            self._end(answer, reason, None, Output(text=answer.text.flush()), now)

        self._guard(answer, cut)

    def _end(
        self,
        answer: Answer,
        reason: FinishReason,
        stop: str | int | None,
        output: Output,
        now: float,
    ) -> None:
        uses = uses_of(answer.sequence.mix, self._cold.get(answer.sequence))
        finish = answer.finish(reason, stop, uses, now)
        self._outbox.append((answer.stream, replace(output, finish=finish)))
        self._let_go(answer)

    def _fail(self, answer: Answer, error: TurretError) -> None:
        self._hand_out()
        self._outbox.append((answer.stream, error))
        self._let_go(answer)

    def _let_go(self, answer: Answer) -> None:
        """Free everything a request holds."""
        sequence = answer.sequence
        del self._answers[sequence]
        self._with_deadline.discard(answer)
        self._ready.pop(sequence, None)
        self._cold.pop(sequence, None)
        if sequence.state is not SequenceState.FINISHED and (
            sequence.state is SequenceState.RUNNING or sequence in self._scheduler.waiting
        ):
            self._scheduler.finish(sequence)
        self._runner.forget(sequence)
        self._adapters.release(sequence.mix)

    def _flush(self) -> None:
        if self._outbox:
            self._observer.handed_out()
            outbox, self._outbox = self._outbox, []
            self._send(outbox)

    def _die(self) -> None:
        self.is_dead = True
        self._meanwhile()
        for answer in list(self._answers.values()):
            self._outbox.append((answer.stream, UnavailableError(say("ENGINE_FAILED"))))
            self._adapters.release(answer.sequence.mix)
        self._answers.clear()
        self._refuse_change()
        self._flush()


class _Between:
    """Called between parts of background work; serves requests until they have had their share.

    Time that is still owed to requests when the work ends is given to them before the next work
    begins.

    Args:
        loop: The loop.
        metrics: Counts the time of the work.
    """

    def __init__(self, loop: EngineLoop, metrics: Metrics) -> None:
        self._loop = loop
        self._metrics = metrics
        self._owed = 0.0
        self._since = 0.0

    def run(self, work: Background) -> None:
        """Run background work."""
        self._since = time.monotonic()
        try:
            work(self)
        finally:
            self._count()

    def _count(self) -> None:
        seconds = time.monotonic() - self._since
        self._metrics.training_seconds.inc(seconds)
        owed = seconds * (1.0 / _BACKGROUND_SHARE - 1.0)
        self._owed = min(self._owed + owed, _MOST_OWED_SECONDS)

    def __call__(self) -> None:
        if self._loop.is_ending:
            raise StoppedError
        self._count()
        while self._owed > 0.0:
            before = time.monotonic()
            if not self._loop.serve():
                self._owed = 0.0
            self._owed -= time.monotonic() - before
        self._since = time.monotonic()
