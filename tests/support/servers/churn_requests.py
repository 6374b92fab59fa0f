"""The requests of the soak test: few enough that each can be repeated alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from builders.bases.tiny_models import VOCAB_SIZE

from turret.clients.aio import AsyncTurretClient
from turret.clients.requests import AdapterWeight
from turret.clients.results import AdapterUse, TokenLogprob

# (name or checkpoint, weight) in the request's order.
Mix = tuple[tuple[str, float], ...]
# The parts of an answer that must depend only on the request and the weights.
Bits = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """A request without its adapters. ``kind`` is ``stream``, ``unary`` or ``score``."""

    kind: str
    prompt: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()


def make_shapes() -> list[Shape]:
    """Short and long prompts, greedy and sampled, streamed, whole and scored."""
    source = random.Random(0)

    def prompt(length: int) -> tuple[int, ...]:
        return tuple(source.randrange(VOCAB_SIZE - 2) for _ in range(length))

    common = prompt(48)
    greedy = {"temperature": 0.0, "ignore_eos": True}
    drawn = {"temperature": 0.9, "seed": 7, "top_p": 0.95}
    return [
        Shape(kind, tokens, tuple(sorted(options.items())))
        for kind, tokens, options in (
            ("stream", prompt(5), {**greedy, "max_tokens": 12}),
            ("unary", prompt(1), {**greedy, "max_tokens": 6}),
            # These share their beginning: three blocks that may be in the prefix cache.
            ("stream", (*common, *prompt(9)), {**greedy, "max_tokens": 8}),
            ("stream", (*common, *prompt(30)), {**drawn, "max_tokens": 10}),
            ("score", (*common, *prompt(3)), {}),
            ("stream", prompt(150), {**drawn, "max_tokens": 24, "frequency_penalty": 0.5}),
            ("unary", prompt(17), {**drawn, "max_tokens": 3, "stop": ("a", "e")}),
            ("stream", prompt(33), {**greedy, "max_tokens": 60}),
        )
    ]


@dataclass(slots=True)
class Answer:
    """The received part of an answer.

    Attributes:
        text, token_ids, logprobs: The contents of all chunks.
        end: The finish reason; None while the answer is running.
        used: The weights that answered, known at the end.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float | None, ...] = ()
    end: str | None = None
    stop: str | int | None = None
    used: tuple[AdapterUse, ...] = ()

    @property
    def bits(self) -> Bits:
        return self.text, self.token_ids, self.logprobs, self.end, self.stop

    def is_beginning_of(self, whole: Bits) -> bool:
        """Whether this incomplete answer is a beginning of ``whole``."""
        text, token_ids, logprobs, _, _ = whole
        return (
            text.startswith(self.text)
            and token_ids[: len(self.token_ids)] == self.token_ids
            and logprobs[: len(self.logprobs)] == self.logprobs
        )


def _values(logprobs: Sequence[TokenLogprob]) -> tuple[float | None, ...]:
    return tuple(item.logprob for item in logprobs)


async def ask(
    client: AsyncTurretClient,
    shape: Shape,
    mix: Mix,
    answer: Answer,
    *,
    deadline_seconds: float = 120.0,
    cancel_after: int | None = None,
) -> None:
    """Send one request, and fill ``answer`` as it arrives.

    Args:
        client: The client.
        shape: The request.
        mix: A mix of registered names.
        answer: An empty answer.
        deadline_seconds: The deadline of the call.
        cancel_after: The number of chunks after which a stream is cancelled.

    Raises:
        TurretRpcError: The call failed; ``answer`` has the earlier part.
    """
    adapters = [AdapterWeight(name, weight) for name, weight in mix]
    options: Any = dict(shape.options)
    if shape.kind == "score":
        score = await client.score(shape.prompt, adapters=adapters, timeout=deadline_seconds)
        answer.logprobs = _values(score.tokens)
        answer.used, answer.end = score.adapters_used, "SCORED"
        return
    options |= {
        "adapters": adapters,
        "logprobs": True,
        "token_ids": True,
        "timeout": deadline_seconds,
    }
    if shape.kind == "unary":
        whole = await client.generate(shape.prompt, **options)
        answer.text, answer.token_ids = whole.text, whole.token_ids
        answer.logprobs, answer.used = _values(whole.logprobs), whole.adapters_used
        answer.end, answer.stop = whole.finish_reason, whole.stop
        return
    count = 0
    async with client.generate_stream(shape.prompt, **options) as stream:
        if cancel_after == 0:
            return
        async for chunk in stream:
            count += 1
            assert answer.end is None, "a chunk after the last one"
            answer.text += chunk.text
            answer.token_ids += chunk.token_ids
            answer.logprobs += _values(chunk.logprobs)
            if chunk.finish_reason is not None:
                answer.end, answer.stop = chunk.finish_reason, chunk.stop
                answer.used = chunk.adapters_used
            elif count == cancel_after:
                return
