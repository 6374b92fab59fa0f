"""Sends one batch of requests, and measures when its tokens reach the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from common.prompts import Chat

from turret.clients.aio import AsyncTurretClient
from turret.clients.messages.requests import GenerateOptions


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's tokens; token ``i`` arrived ``times[i]`` seconds after the start."""

    token_ids: tuple[int, ...]
    times: tuple[float, ...]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class BatchTiming:
    """The times of a batch.

    Attributes:
        first_seconds: The time from the start until every request had its first token.
        total_seconds: The time from the start until every request had its last token.
        mean_first_seconds: The mean time to the first token.
        decode_rate: ``batch · (tokens − 1) / (total_seconds − first_seconds)``, tokens/s.
        late_rate: Like ``decode_rate``, but counts only the tokens that arrived after
            ``first_seconds``. It is lower if some requests decode while others still prefill.
    """

    first_seconds: float
    total_seconds: float
    mean_first_seconds: float
    decode_rate: float
    late_rate: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> BatchTiming:
        firsts = [answer.times[0] for answer in answers]
        first, total = max(firsts), max(answer.times[-1] for answer in answers)
        span = total - first
        after_first = sum(len(answer.times) - 1 for answer in answers)
        late = sum(moment > first for answer in answers for moment in answer.times)
        return cls(
            first_seconds=first,
            total_seconds=total,
            mean_first_seconds=sum(firsts) / len(firsts),
            decode_rate=after_first / span if span else 0.0,
            late_rate=late / span if span else 0.0,
        )


def send_batch(
    address: str,
    prompts: Sequence[Chat],
    adapters: Sequence[str | None],
    new_tokens: int,
    options: Sequence[GenerateOptions] | None = None,
) -> list[Answer]:
    """Send all prompts at once; decoding is greedy.

    Args:
        address: The address of the server.
        prompts: One conversation per request.
        adapters: One adapter, or None, per request.
        new_tokens: The length of every answer.
        options: Other options of every request.

    Raises:
        TurretRpcError: A request failed.
        ValueError: An answer has a different length.
    """

    async def send() -> list[Answer]:
        async with AsyncTurretClient(address) as client:
            # Connect first, so that the time does not include it.
            await client.get_model()
            start = time.perf_counter()
            free: list[GenerateOptions] = [{} for _ in prompts]
            requests = zip(prompts, adapters, options or free, strict=True)
            return await asyncio.gather(
                *(_send_one(client, start, new_tokens, *request) for request in requests)
            )

    return asyncio.run(send())


async def _send_one(
    client: AsyncTurretClient,
    start: float,
    new_tokens: int,
    prompt: Chat,
    adapter: str | None,
    options: GenerateOptions,
) -> Answer:
    token_ids: list[int] = []
    times: list[float] = []
    cached_tokens = 0
    asked: GenerateOptions = {
        **options,
        "adapters": () if adapter is None else adapter,
        "temperature": 0.0,
        "max_tokens": new_tokens,
        "ignore_eos": True,
        "token_ids": True,
    }
    stream = client.chat_stream(prompt, **asked)
    async with stream:
        async for chunk in stream:
            now = time.perf_counter() - start
            token_ids += chunk.token_ids
            times += [now] * len(chunk.token_ids)
            if chunk.usage is not None:
                cached_tokens = chunk.usage.cached_tokens
    if len(token_ids) != new_tokens:
        raise ValueError(f"asked for {new_tokens} tokens, got {len(token_ids)}")
    return Answer(tuple(token_ids), tuple(times), cached_tokens)
