"""A request between admission and its last output: what it has produced and when it ends."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from turret.server.adapters.mix import HostResult, Mix
from turret.server.engine.detokenizer import AnswerText
from turret.server.engine.scheduling.request import (
    AdapterUse,
    Finish,
    FinishReason,
    Output,
    Timing,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step.runner import PromptLogprob
from turret.server.engine.step.sampler import Draw
from turret.server.engine.stream import Stream


def uses_of(mix: Mix, cold: HostResult | None) -> tuple[AdapterUse, ...]:
    """How a request's adapters were used; ``cold`` lists those that were read for it."""
    seconds = {} if cold is None else cold.load_seconds
    return tuple(
        AdapterUse(
            name=adapter.name,
            uuid=adapter.uuid,
            generation=adapter.generation,
            weight=weight,
            cold_start=adapter.key in seconds,
            load_ms=1000.0 * seconds.get(adapter.key, 0.0),
        )
        for adapter, weight in mix.members
    )


class Answer:
    """Bookkeeping of one request on the engine thread.

    Args:
        sequence: Its tokens.
        stream: Where outputs go.
        text: Its text, which has taken in what the request says was answered before.
        token_text: Text of a single token, for logprobs.
        max_tokens: Most tokens to generate, resolved against the context.
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
        self._text = text
        self._token_text = token_text
        self._max_tokens = max_tokens
        self._prompt_logprobs: list[TokenLogprob] = []
        self._prompt_logprobs_taken = False

    def add_prompt_logprobs(self, found: SequenceOf[PromptLogprob]) -> None:
        """Collect scored prompt positions; a recomputed position is not counted twice."""
        if self._prompt_logprobs_taken:
            return
        prompt = self.sequence.request.prompt_token_ids
        if not self._prompt_logprobs:
            self._prompt_logprobs.append(TokenLogprob(prompt[0], self._token_text(prompt[0]), None))
        for item in found:
            if item.position == len(self._prompt_logprobs):
                self._prompt_logprobs.append(self._logprob(item.draw))

    def accept(
        self, draws: SequenceOf[Draw], cold: HostResult | None = None
    ) -> tuple[Output, FinishReason | None, str | int | None]:
        """Add the tokens that a step drew, until one of them ends the sequence.

        Args:
            draws: The tokens, in order; at least one.
            cold: What was read for the request, which the first output tells.

        Returns:
            The output they make certain, and why (and by what) the sequence ends, if it does.

        Raises:
            TurretError: None was drawn.
        """
        sequence = self.sequence
        options = sequence.request.options
        is_first = sequence.num_generated == len(sequence.request.answer_so_far)
        text, taken = "", list[Draw]()
        ended, by = None, None
        for draw in draws:
            if draw.error is not None:
                raise draw.error
            sequence.tokens.append(draw.token_id)
            taken.append(draw)
            text += self._text.push(draw.token_id)
            by = self._text.stopped_by
            if by is not None:
                ended = FinishReason.STOP
            elif sequence.num_generated >= self._max_tokens:
                ended = FinishReason.LENGTH
                text += self._text.flush()
            if ended is not None:
                break
        output = Output(
            text=text,
            token_ids=tuple([draw.token_id for draw in taken]),
            logprobs=tuple(map(self._logprob, taken)) if options.logprobs else (),
            prompt_logprobs=self._take_prompt_logprobs(),
            adapters_used=uses_of(sequence.mix, cold) if is_first else (),
        )
        return output, ended, by

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

    def flush(self) -> str:
        """Held-back text, for a request that ends early."""
        return self._text.flush()

    def finish(
        self,
        reason: FinishReason,
        stop: str | int | None,
        adapters_used: tuple[AdapterUse, ...],
        now: float,
    ) -> Finish:
        """The request's last word."""
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
