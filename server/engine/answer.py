"""A request between admission and its last output: what it has produced and when it ends."""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from turret.server.adapters.adapter import HostResult, Mix
from turret.server.engine.scheduling.request import (
    AdapterUse,
    Finish,
    FinishReason,
    Output,
    Request,
    StopConditions,
    Timing,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step.runner import PromptLogprob
from turret.server.engine.step.sampler import Draw
from turret.server.errors import (
    BudgetExceededError,
    InvalidRequestError,
    QueueFullError,
    TurretError,
)
from turret.server.words import say

if TYPE_CHECKING:
    from turret.server.models.tokenizer import TokenStream

# The text of a growing answer, and the detection of its end.


class AnswerText:
    """Turns tokens into final text and reports which token ends the answer.

    Returned text is final: text that might be the beginning of a stop string is held back until the
    next tokens decide.

    Args:
        stream: Decodes the tokens, one at a time.
        stop: When the answer ends; ``max_tokens`` is ignored.
        eos_token_ids: The model's end-of-sequence tokens.
        is_constrained: Whether a constraint applies. If so, end tokens are drawn only when the
            answer is complete, and always end it.

    Attributes:
        stopped_by: The stop string or token that has ended the answer, or None.
    """

    def __init__(
        self,
        stream: TokenStream,
        stop: StopConditions,
        eos_token_ids: frozenset[int],
        *,
        is_constrained: bool = False,
    ) -> None:
        self._stream = stream
        self._stop = stop
        self._always = eos_token_ids if is_constrained else frozenset()
        self._ends = stop.stop_token_ids | (frozenset() if stop.ignore_eos else eos_token_ids)
        self._held = ""
        self._num_tokens = 0
        self._final = ""
        # Tokens that are not decoded yet, each with whether the answer may end at it and whether
        # it does.
        self._added: list[tuple[int, bool, bool]] = []
        self.stopped_by: str | int | None = None

    def add(self, token: int) -> None:
        """Add a token. With stop strings, it is decoded here; otherwise ``take`` decodes it."""
        self._num_tokens += 1
        # Below ``min_tokens``, neither stop strings nor stop tokens end the answer. Only the end
        # tokens of a constrained answer do.
        may_stop = self._num_tokens >= self._stop.min_tokens
        is_end = token in self._always or (may_stop and token in self._ends)
        if is_end:
            self.stopped_by = token
        self._added.append((token, may_stop or is_end, is_end))
        if self._stop.stop_strings:
            self._decode()

    def take(self) -> str:
        """The text that has become final since the last call.

        If a stop string was found, the text ends before it or, with ``include_stop``, after it.
        """
        self._decode()
        text, self._final = self._final, ""
        return text

    def push(self, token: int) -> str:
        """Add a token; returns the text that it makes final."""
        self.add(token)
        return self.take()

    def _decode(self) -> None:
        for token, may_stop, is_end in self._added:
            self._final += self._text_of(token, may_stop, is_end)
        self._added.clear()

    def _text_of(self, token: int, may_stop: bool, is_end: bool) -> str:
        if is_end and not self._stop.include_stop:
            # The end token is not part of the answer's text.
            return self.flush()
        self._held += self._stream.push(token)
        if not self._stop.stop_strings:
            return self.flush()
        stops = self._stop.stop_strings if may_stop else ()
        found = [(at, stop) for stop in stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda f: (f[0], -len(f[1])))
            text = self._held[: at + (len(stop) if self._stop.include_stop else 0)]
            self._held = ""
            self.stopped_by = stop if self.stopped_by is None else self.stopped_by
            return text
        if self.stopped_by is not None:
            return self.flush()
        count = len(self._held) - self._possible_start()
        text, self._held = self._held[:count], self._held[count:]
        return text

    def replay(self, tokens: Collection[int]) -> None:
        """Add the tokens of an earlier answer to the same request, without returning its text.

        Raises:
            InvalidRequestError: One of these tokens already ends the answer.
        """
        for index, token in enumerate(tokens):
            self.push(token)
            if self.stopped_by is not None:
                raise InvalidRequestError.of("answer_so_far", say("ANSWER_ENDED", index=index))

    def flush(self) -> str:
        """The text that was held back, which is final once the answer has ended."""
        text, self._held = self._held, ""
        return text

    def _possible_start(self) -> int:
        """Length of the longest suffix of the held text with which a stop string begins."""
        longest = 0
        for stop in self._stop.stop_strings:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest


# The asyncio side of a request: the count of its memory, and an async iterator of its outputs.


class AnswerMemory:
    """Counts the memory of requests and their answers. Belongs to one event loop.

    Args:
        most: The limit in bytes. A tenant may hold half of it when one of its requests arrives,
            and three quarters while its answers grow. A quarter is left to others. If all tenants
            together hold more than the limit, each may hold an equal share.

    Attributes:
        most: The limit.
        held: The memory that all requests and answers hold, in bytes.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self._held_of: Counter[bytes] = Counter()

    def hold(self, num_bytes: int, tenant: bytes) -> bool:
        """Count memory that is taken, or memory that is freed if the number is negative.

        Returns:
            Whether an answer that takes this memory may grow further.
        """
        self.held += num_bytes
        if not tenant:
            return self.held <= self.most
        self._held_of[tenant] += num_bytes
        held = self._held_of[tenant]
        if not held:
            del self._held_of[tenant]
        return held <= self.most_of_answers(tenant)

    def held_of(self, tenant: bytes) -> int:
        """The memory that a tenant holds."""
        return self._held_of.get(tenant, 0)

    def most_of_answers(self, tenant: bytes) -> int:
        """The limit for the requests of a tenant and their growing answers."""
        if not tenant:
            return self.most
        if self.held > self.most and len(self._held_of) > 1:
            return self.most // len(self._held_of)
        return self.most * 3 // 4

    def admit(self, request: Request) -> None:
        """Check that a request fits. A request that is alone may take more than the limit.

        Raises:
            QueueFullError: The request would fit later.
            BudgetExceededError: The request never fits, because the log probabilities of its
                prompt alone exceed the limit.
        """
        tenant, num_bytes = request.tenant, request.num_bytes
        most = self.most // 2 if tenant else self.most
        if request.prompt_logprob_bytes > most:
            text = say(
                "ANSWERS_NEED_MEMORY", bytes=request.prompt_logprob_bytes, max_queued_bytes=most
            )
            raise BudgetExceededError(text)
        held = self.held_of(tenant)
        if held and held + num_bytes > most:
            raise QueueFullError(say("QUEUE_MEMORY_SHARE_FULL", held=held, max_queued_bytes=most))
        if self.held and self.held + num_bytes > self.most:
            text = say("QUEUE_MEMORY_FULL", held=self.held, max_queued_bytes=self.most)
            raise QueueFullError(text)


# Maximum unread output of one answer, not counting the next item to be read, which may hold the
# logprobs of a long prompt.
MAX_UNREAD_BYTES = 8 << 20
# The same limit for an answer whose tenant already holds too much memory. A client that reads as
# fast as it can never has this much unread.
_LEAST_UNREAD_BYTES = 64 << 10


class Stream:
    """Outputs of one request, in order; the last carries ``finish``.

    Iterating raises the request's ``TurretError`` if it failed. It raises a ``BudgetExceededError``
    if more than ``MAX_UNREAD_BYTES`` of the answer wait to be read; the limit is lower if the
    tenant already holds too much memory. Belongs to one event loop.

    Args:
        cancel: Ends the request.
        memory: Counts the memory that the request and its unread output take.
        tenant: The tenant that holds this memory.
        num_bytes: The approximate memory of the request itself.
    """

    def __init__(
        self,
        cancel: Callable[[], None],
        memory: AnswerMemory,
        tenant: bytes = b"",
        num_bytes: int = 0,
    ) -> None:
        # This is None once the memory is no longer counted.
        self._cancel: Callable[[], None] | None = cancel
        self._memory, self._tenant = memory, tenant
        self._held = 0
        self._items: deque[tuple[Output | TurretError, int]] = deque()
        # The reader's future, which costs less per token than an asyncio.Event.
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._overflowed = False
        self._own_bytes = num_bytes
        self._keep(num_bytes)

    def deliver(self, item: Output | TurretError) -> None:
        """Add an item; called on the event loop."""
        if self._overflowed:
            return
        num_bytes = item.num_bytes if isinstance(item, Output) else 0
        self._items.append((item, num_bytes))
        most = MAX_UNREAD_BYTES if self._keep(num_bytes) else _LEAST_UNREAD_BYTES
        if self._held - self._own_bytes - self._items[0][1] > most:
            self._overflow(most)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self) -> None:
        """Stop the request at the engine's next step. Idempotent; harmless when finished."""
        cancel = self._cancel
        self._let_go()
        if cancel is not None:
            cancel()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Output:
        if self._ended:
            raise StopAsyncIteration
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item, num_bytes = self._items.popleft()
        self._keep(-num_bytes)
        if isinstance(item, TurretError):
            self._end()
            raise item
        if item.finish is not None:
            self._end()
        return item

    def _overflow(self, most: int) -> None:
        self._overflowed = True
        self._items.clear()
        error = BudgetExceededError(say("ANSWER_UNREAD", max_unread_bytes=most))
        self._items.append((error, 0))
        self.cancel()

    def _end(self) -> None:
        self._ended = True
        self._let_go()

    def _keep(self, num_bytes: int) -> bool:
        """Count a change of the memory; returns whether the answer may grow further."""
        self._held += num_bytes
        return self._cancel is None or self._memory.hold(num_bytes, self._tenant)

    def _let_go(self) -> None:
        """Stop counting memory and drop the reference to the request; more items may arrive."""
        if self._cancel is not None:
            self._memory.hold(-self._held, self._tenant)
        self._held = self._own_bytes = 0
        self._cancel = None


def uses_of(mix: Mix, cold: HostResult | None) -> tuple[AdapterUse, ...]:
    """How a request's adapters were used; ``cold`` lists those that were loaded for the request."""
    seconds = {} if cold is None else cold.load_seconds
    return tuple(
        AdapterUse(
            name=adapter.name,
            uuid=adapter.uuid,
            generation=adapter.generation,
            digest=adapter.digest,
            weight=weight,
            cold_start=adapter.key in seconds,
            load_ms=1000.0 * seconds.get(adapter.key, 0.0),
        )
        for adapter, weight in mix.members
    )


class Answer:
    """Bookkeeping of one request on the engine thread.

    Args:
        sequence: The request's sequence.
        stream: The stream for outputs.
        text: The answer's text, including the request's ``answer_so_far``.
        token_text: Returns the text of a single token, for logprobs.
        max_tokens: Maximum number of tokens to generate, limited by the context.
    """

    def __init__(
        self,
        sequence: Sequence,
        stream: Stream,
        text: AnswerText,
        *,
        token_text: Callable[[int], str],
        max_tokens: int,
    ) -> None:
        self.sequence = sequence
        self.stream = stream
        self.last_token_at: float | None = None
        self.text = text
        self._token_text = token_text
        self._max_tokens = max_tokens
        self._prompt_logprobs: list[TokenLogprob] = []
        self._prompt_logprobs_taken = False
        self._accepted: list[Draw] = []
        self._has_begun = False

    def add_prompt_logprobs(self, found: SequenceOf[PromptLogprob]) -> None:
        """Collect scored prompt positions. A recomputed position is not counted twice."""
        if self._prompt_logprobs_taken:
            return
        prompt = self.sequence.request.prompt_token_ids
        if not self._prompt_logprobs:
            self._prompt_logprobs.append(TokenLogprob(prompt[0], self._token_text(prompt[0]), None))
        for item in found:
            if item.position == len(self._prompt_logprobs):
                self._prompt_logprobs.append(self._logprob(item.draw))

    def accept(self, draws: SequenceOf[Draw]) -> tuple[int, FinishReason | None, str | int | None]:
        """Add the tokens that a step drew, until one of them ends the sequence.

        Args:
            draws: The tokens, in order; at least one.

        Returns:
            The number of added tokens. If the sequence ends, also the reason, and the stop string
            or token that ended it, if any.

        Raises:
            TurretError: A draw failed.
        """
        sequence = self.sequence
        for count, draw in enumerate(draws, 1):
            if draw.error is not None:
                raise draw.error
            sequence.tokens.append(draw.token_id)
            self._accepted.append(draw)
            self.text.add(draw.token_id)
            by = self.text.stopped_by
            if by is not None:
                return count, FinishReason.STOP, by
            if sequence.num_generated >= self._max_tokens:
                return count, FinishReason.LENGTH, None
        return len(draws), None, None

    def output(self, cold: HostResult | None = None, *, is_last: bool) -> Output:
        """The output for the tokens that were accepted since the last output.

        Args:
            cold: The adapters that were loaded for the request, which the first output reports.
            is_last: Whether the sequence has ended.
        """
        sequence = self.sequence
        taken, self._accepted = self._accepted, []
        is_first, self._has_begun = not self._has_begun, True
        text = self.text.take()
        return Output(
            text=text + self.text.flush() if is_last else text,
            token_ids=tuple([draw.token_id for draw in taken]),
            logprobs=tuple(map(self._logprob, taken)) if sequence.request.options.logprobs else (),
            prompt_logprobs=self._take_prompt_logprobs(),
            adapters_used=uses_of(sequence.mix, cold) if is_first else (),
        )

    def of_prompt(self, pooled: array[float] | None) -> Output:
        """The answer to a request that generates nothing, once its prompt is computed."""
        sequence = self.sequence
        head = sequence.mix.head if sequence.request.classifies else None
        return Output(prompt_logprobs=self._take_prompt_logprobs(), pooled=pooled, head=head)

    def _take_prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        """The prompt's logprobs, once they are complete; empty before and after."""
        if len(self._prompt_logprobs) < self.sequence.num_prompt:
            return ()
        self._prompt_logprobs_taken = True
        taken = tuple(self._prompt_logprobs)
        self._prompt_logprobs = []
        return taken

    def finish(
        self,
        reason: FinishReason,
        stop: str | int | None,
        adapters_used: tuple[AdapterUse, ...],
        now: float,
    ) -> Finish:
        """How the request ended, for its last output."""
        sequence = self.sequence
        arrival = sequence.arrival
        scheduled = now if sequence.scheduled_at is None else sequence.scheduled_at
        first = now if sequence.first_token_at is None else sequence.first_token_at
        return Finish(
            reason=reason,
            stop=stop,
            usage=Usage(
                prompt_tokens=sequence.num_prompt,
                cached_tokens=sequence.num_cached,
                completion_tokens=sequence.num_generated,
            ),
            adapters_used=adapters_used,
            timing=Timing(
                queue_seconds=scheduled - arrival,
                time_to_first_token_seconds=first - arrival,
                total_seconds=now - arrival,
            ),
        )

    def _logprob(self, draw: Draw) -> TokenLogprob:
        top = tuple(TopLogprob(i, self._token_text(i), value) for i, value in draw.top)
        return TokenLogprob(draw.token_id, self._token_text(draw.token_id), draw.logprob, top)
