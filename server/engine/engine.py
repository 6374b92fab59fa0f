"""The engine: one thread that owns the device, behind an asyncio interface.

``submit`` checks a request, takes references on its adapters and posts it to the engine thread
(``loop.py``). Outputs of a whole step come back to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

from turret.server.adapters.adapter import Mix
from turret.server.adapters.registry import AdapterRegistry
from turret.server.basics.turns import FairPool
from turret.server.constraints.matcher import start_roomy
from turret.server.engine.answer import Answer, AnswerMemory, AnswerText, Stream
from turret.server.engine.loop import (
    BaseChange,
    BaseSwap,
    EngineFailedError,
    EngineLoop,
    Outbox,
    StoppedError,
    check_heads,
    check_vocabulary,
)
from turret.server.engine.scheduling.request import Request
from turret.server.engine.scheduling.scheduler import Scheduler, add_first_pass
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.speculation import Drafter
from turret.server.engine.step.runner import Runner
from turret.server.errors import (
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    TurretError,
    UnavailableError,
)
from turret.server.metrics import Metrics
from turret.server.words import say

if TYPE_CHECKING:
    from turret.server.models.tokenizer import Tokenizer

T = TypeVar("T")
# Converting more tokens than this to text takes over a millisecond, too long for the event loop.
_INLINE_TOKENS = 128
# Replays longer than that run here, one at a time, because a replay holds the interpreter's lock.
_replaying = FairPool(ThreadPoolExecutor(1, "turret-replay"))


class Engine:
    """Runs requests on one model.

    Args:
        scheduler: Made for the same cache and adapters as ``runner``.
        runner: Computes steps.
        adapters: Resolves and holds adapters.
        tokenizer: The base's tokenizer.
        metrics: The metrics to update.
        max_model_len: Maximum number of tokens (prompt and output) of one sequence.
        max_queued_requests: Maximum number of waiting requests. Further ones are rejected. One
            tenant may have three quarters of the places.
        max_queued_bytes: Maximum memory of waiting and running requests and of unread answers. A
            request that would exceed it is rejected, unless it is the only one; see
            ``AnswerMemory``.
        long_from: ``Arch.long_from`` of the model.
        speculates: Whether answers get drafters, which the scheduler's speculation uses.
        allow_merged_twice: Whether requests may name adapters that are part of the base.
        on_thread: Returns a context in which the thread does all its work.

    Attributes:
        is_dead: Whether the thread has failed, so that nothing will be served any more.
        dead: An event that is set on the event loop when the thread fails.
        max_model_len: The model's context in tokens, or the size of the KV cache if that is less.
        memory: The memory of waiting and running requests and of their answers.
        num_open: Number of waiting and running requests; read it on the event loop.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: Runner,
        adapters: AdapterRegistry,
        tokenizer: Tokenizer,
        metrics: Metrics,
        max_model_len: int,
        max_queued_requests: int,
        max_queued_bytes: int,
        long_from: int | None = None,
        speculates: bool = False,
        allow_merged_twice: bool = False,
        on_thread: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._on_thread = on_thread
        self._long_from = long_from
        self._speculates = speculates
        self._adapters = adapters
        self._tokenizer = tokenizer
        self._max_queued_requests = max_queued_requests
        self.memory = AnswerMemory(max_queued_bytes)
        self._block_size = scheduler.blocks.block_size
        self._num_blocks = scheduler.blocks.num_blocks - 1
        self.max_model_len = min(max_model_len, self._num_blocks * self._block_size)
        self._loop = loop = EngineLoop(
            scheduler=scheduler,
            runner=runner,
            adapters=adapters,
            metrics=metrics,
            send=self._send,
            allow_merged_twice=allow_merged_twice,
        )
        adapters.on_force_unload.append(lambda uuid: loop.post(lambda: loop.force_unload(uuid)))
        adapters.on_unloaded = lambda key: loop.post(lambda: runner.forget_adapter(key))
        self._draining = False
        self._thread: threading.Thread | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        self.num_open = 0
        self.dead = asyncio.Event()

    @property
    def is_dead(self) -> bool:
        return self._loop.is_dead

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait to be computed."""
        return self._loop.num_waiting

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence's adapters are resident. The scheduler calls this."""
        return self._loop.is_ready(sequence)

    async def start(self) -> None:
        """Start the thread; outputs will go to the running event loop."""
        self._event_loop = asyncio.get_running_loop()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # This thread also runs some grammar matchers, which need a large stack.
        start_roomy(self._thread)

    async def submit(self, request: Request) -> Stream:
        """Accept a request.

        Raises:
            UnavailableError: The engine has not started, is draining or is dead.
            QueueFullError: Too many requests wait, or they take too much memory.
            PromptTooLongError, InvalidRequestError: The request cannot run on this model.
            AdapterNotFoundError, BudgetExceededError: The request's adapters cannot be used.
        """
        arrival = time.monotonic()
        if self.is_dead:
            raise UnavailableError(say("ENGINE_FAILED"))
        if self._draining or self._thread is None:
            raise UnavailableError(say("SHUTTING_DOWN"))
        self._check_token_ids(request)
        text = await self._begin_text(request)
        most = self._max_queued_requests
        if self._loop.num_waiting >= most:
            raise QueueFullError(say("QUEUE_FULL", max_queued_requests=most))
        most_of_tenant = most - most // 4
        if request.tenant and self._loop.num_waiting_of(request.tenant) >= most_of_tenant:
            raise QueueFullError(say("QUEUE_SHARE_FULL", max_queued_requests=most_of_tenant))
        self.memory.admit(request)
        mix = self._adapters.acquire(request.adapters, request.tenant)
        try:
            check_heads(request, mix)
            answer = self._make_answer(request, text, mix, arrival)
        except TurretError:
            self._adapters.release(mix)
            raise
        self.num_open += 1
        self._idle.clear()
        self._loop.submit(answer)
        return answer.stream

    def change_base(self, change: BaseSwap) -> Future[None]:
        """Run ``change`` on the engine thread once no request runs; callable from any thread.

        Running requests finish first. Waiting requests continue afterwards, on the new weights.
        Only one change may be pending at a time.

        Returns:
            A future that is done when the weights have changed; UnavailableError if the engine
            stops first. If it is cancelled before the change begins, requests continue at once.

        Raises:
            UnavailableError: The engine has not started, is draining or is dead.
        """
        if self._draining or self._thread is None or self.is_dead:
            raise UnavailableError(say("SHUTTING_DOWN"))
        waiting = BaseChange(change)
        # If the change is withdrawn, wake the engine's loop, which may be idle.
        waiting.outcome.add_done_callback(lambda _: self._loop.post(lambda: None))
        self._loop.post(lambda: self._loop.change_base(waiting))
        return waiting.outcome

    def run_background(self, work: Callable[[Callable[[], None]], T]) -> Future[T]:
        """Run work that yields to requests, on the engine thread; callable from any thread.

        Args:
            work: The work. It receives a function that it must call between its parts.

        Returns:
            A future of the work's result; UnavailableError if the engine stops first.
        """
        outcome: Future[T] = Future()

        def run(between: Callable[[], None]) -> None:
            if not outcome.set_running_or_notify_cancel():
                return
            try:
                between()
                outcome.set_result(work(between))
            except StoppedError:
                outcome.set_exception(UnavailableError(say("SHUTTING_DOWN")))
            except Exception as error:
                outcome.set_exception(error)
            except EngineFailedError:
                outcome.set_exception(UnavailableError(say("ENGINE_FAILED")))
                raise

        if self._draining or self._thread is None or self.is_dead:
            outcome.set_exception(UnavailableError(say("SHUTTING_DOWN")))
        else:
            self._loop.post_background(run)
        return outcome

    async def drain(self, grace_seconds: float) -> None:
        """Reject new requests, wait for the others, cancel those that remain, and stop the thread.

        Args:
            grace_seconds: How long to wait before cancelling.
        """
        self._draining = True
        if self._thread is None:
            return
        if not self.is_dead:
            try:
                await asyncio.wait_for(self._idle.wait(), max(grace_seconds, 0.0))
            except TimeoutError:
                self._loop.post(self._loop.cancel_all)
                await self._idle.wait()
        self._loop.post(self._loop.stop)
        await asyncio.to_thread(self._thread.join)

    def _make_answer(self, request: Request, text: AnswerText, mix: Mix, arrival: float) -> Answer:
        sequence = self._make_sequence(request, mix, arrival)
        sequence.vocab_size = check_vocabulary(request, mix)
        add_first_pass(sequence)
        max_tokens = self._check_length(request, sequence)
        max_tokens = self._choose_frequencies(sequence, max_tokens)
        if sequence.first_pass is not None:
            sequence.first_pass.is_long = sequence.is_long
        sequence.drafter = self._make_drafter(sequence, max_tokens)
        loop = self._loop
        stream = Stream(
            lambda: loop.post(lambda: loop.cancel(sequence)),
            self.memory,
            request.tenant,
            request.num_bytes,
        )
        return Answer(
            sequence,
            stream,
            text,
            token_text=self._tokenizer_of(request).token_text,
            max_tokens=max_tokens,
        )

    def _make_drafter(self, sequence: Sequence, max_tokens: int) -> Drafter | None:
        """Make the sequence's drafter, or None if the request cannot use drafts."""
        request = sequence.request
        # A constraint's mask covers only the next token, so drafts could not be checked.
        if not self._speculates or not request.generates or request.constraint is not None:
            return None
        if sequence.first_pass is not None:
            # A sequence with a first pass computes two rows per token: drafts would cost double.
            return None
        stop = request.stop
        return Drafter(
            (sequence.group, request.salt),
            sequence.tokens,
            start=sequence.num_virtual,
            prompt_end=sequence.prompt_end,
            max_tokens=max_tokens,
            end_ids=stop.stop_token_ids
            | (frozenset() if stop.ignore_eos else self._tokenizer_of(request).eos_token_ids),
        )

    def _tokenizer_of(self, request: Request) -> Tokenizer:
        """The tokenizer of the request's tokens: the adapter's own, or the base's."""
        own = request.own_tokenizer
        return self._tokenizer if own is None else own.tokenizer

    async def _begin_text(self, request: Request) -> AnswerText:
        """Start the answer's text, including the answer so far that the request carries."""
        own = self._tokenizer_of(request)
        text = AnswerText(
            own.stream(request.options.call_marks, request.options.user_text_only),
            request.stop,
            own.eos_token_ids,
            is_constrained=request.constraint is not None,
        )
        so_far = request.answer_so_far
        if len(so_far) <= _INLINE_TOKENS:
            text.replay(so_far)
        else:
            await _replaying.run(request.tenant, lambda: text.replay(so_far))
        return text

    def _make_sequence(self, request: Request, mix: Mix, arrival: float) -> Sequence:
        """Make the sequence, with the positions before the prompt that an adapter fills."""
        soft = [
            (adapter, weight)
            for adapter, weight in mix.members
            if adapter.num_soft_tokens or adapter.num_prefix_positions
        ]
        if not soft:
            return Sequence(request, mix, arrival)
        if len(soft) > 1 or soft[0][1] != 1.0:
            names = ", ".join(adapter.name for adapter, _ in soft)
            raise InvalidRequestError.of("adapters", say("PREFIX_NOT_ALONE", adapters=names))
        prefix = soft[0][0].num_prefix_positions
        if prefix == 0:
            return Sequence(request, mix, arrival, num_virtual=soft[0][0].num_soft_tokens)
        padding = -prefix % self._block_size
        slots = prefix + padding
        return Sequence(
            request, mix, arrival, num_virtual=slots, num_preset=slots, num_padding=padding
        )

    def _check_token_ids(self, request: Request) -> None:
        size = self._tokenizer_of(request).vocab_size
        for name, ids in (
            ("input.token_ids", request.prompt_token_ids),
            ("answer_so_far", request.answer_so_far),
            ("sampling.logit_bias", request.sampling.logit_bias),
            ("stop.stop_token_ids", request.stop.stop_token_ids),
        ):
            # min and max run in C; a prompt may have a hundred thousand tokens.
            low, high = min(ids, default=0), max(ids, default=0)
            if low < 0 or high >= size:
                wrong = low if low < 0 else high
                raise InvalidRequestError.of(name, say("NOT_A_TOKEN", value=wrong, size=size))

    def _check_length(self, request: Request, sequence: Sequence) -> int:
        """The maximum number of tokens to generate. Virtual positions do not count as text."""
        prompt = len(request.prompt_token_ids)
        # A sequence with a first pass takes twice as many blocks.
        capacity = self._num_blocks // len(sequence.passes) * self._block_size
        limit = min(self.max_model_len, capacity - sequence.num_virtual)
        wanted = request.stop.max_tokens
        if not request.generates:
            wanted = 0
        least = len(request.answer_so_far) + 1 if wanted is None else wanted
        if prompt + least > limit:
            lengths = {"prompt_tokens": prompt, "max_model_len": limit}
            said = say("CONTEXT_TOO_SHORT", **lengths)
            if wanted and prompt < limit:
                lengths |= {"max_tokens": wanted, "room": limit - prompt}
                said = say("MAX_TOKENS_TOO_LARGE", **lengths)
            raise PromptTooLongError(said, violations=[("input", said)])
        return limit - prompt if wanted is None else wanted

    def _choose_frequencies(self, sequence: Sequence, max_tokens: int) -> int:
        """Decide whether a sequence uses the rotary frequencies of long ones (``Arch.long_from``).

        This cannot change later, because cached keys stay rotated. Without ``max_tokens``, the
        answer to a short prompt is limited so that the sequence stays short.

        Returns:
            The maximum number of tokens to generate.
        """
        if self._long_from is None:
            return max_tokens
        start = sequence.prompt_end - sequence.num_padding
        request = sequence.request
        if request.stop.max_tokens is None and request.generates and start < self._long_from:
            max_tokens = min(max_tokens, self._long_from - start)
        sequence.is_long = start + max_tokens > self._long_from
        return max_tokens

    def _deliver(self, outbox: Outbox) -> None:
        for stream, item in outbox:
            stream.deliver(item)
            if isinstance(item, TurretError) or item.finish is not None:
                self.num_open -= 1
        if self.num_open == 0:
            self._idle.set()

    # The methods below run on the engine thread.

    def _run(self) -> None:
        try:
            with self._on_thread():
                self._loop.run()
        finally:
            if self.is_dead:
                self._call(self._bury)

    def _bury(self) -> None:
        self.dead.set()
        self._loop.run_leftovers()

    def _send(self, outbox: Outbox) -> None:
        self._call(functools.partial(self._deliver, outbox))

    def _call(self, function: Callable[[], None]) -> None:
        assert self._event_loop is not None
        if not self._event_loop.is_closed():
            self._event_loop.call_soon_threadsafe(function)
