"""Sends batches of requests with prompts of one length, and measures when tokens arrive."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from turret.clients.aio import AsyncTurretClient
from turret.clients.client import TurretClient
from turret.clients.requests import GenerateOptions

Chat = list[tuple[str, str]]

# In the usual vocabularies each word is one token after a space; the length is checked anyway.
_WORDS = ("time", "people", "way", "water", "day", "part", "place", "work", "year", "name", "line")
_MAX_CORRECTIONS = 8


class PromptSource:
    """Makes prompts for one model.

    The first words differ from prompt to prompt, so that no two share a block of the server's
    prefix cache.

    Args:
        client: The client that measures the length of each prompt.
        num_tokens: The length of every prompt, including the chat template.
    """

    def __init__(self, client: TurretClient, num_tokens: int) -> None:
        self._client = client
        self._num_tokens = num_tokens
        self._numbers = itertools.count(1000)

    def take(self, count: int) -> list[Chat]:
        """The next ``count`` prompts.

        Raises:
            ValueError: No prompt of this length was found, because it is too short for the chat
                template.
        """
        return [self._make(next(self._numbers)) for _ in range(count)]

    def _make(self, number: int) -> Chat:
        num_words = 0
        for _ in range(_MAX_CORRECTIONS):
            words = (_WORDS[(number + i) % len(_WORDS)] for i in range(num_words))
            chat = [("system", f"{number} is your number."), ("user", " ".join(["Tell", *words]))]
            excess = len(self._client.tokenize(chat).token_ids) - self._num_tokens
            if excess == 0:
                return chat
            num_words -= excess
            if num_words < 0:
                break
        raise ValueError(f"no chat prompt of exactly {self._num_tokens} tokens")


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
    """

    first_seconds: float
    total_seconds: float
    mean_first_seconds: float
    decode_rate: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> BatchTiming:
        firsts = [answer.times[0] for answer in answers]
        first, total = max(firsts), max(answer.times[-1] for answer in answers)
        span = total - first
        after_first = sum(len(answer.times) - 1 for answer in answers)
        return cls(
            first_seconds=first,
            total_seconds=total,
            mean_first_seconds=sum(firsts) / len(firsts),
            decode_rate=after_first / span if span else 0.0,
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


def register(address: str, names: Sequence[str], paths: Sequence[str] | None = None) -> float:
    """Load every adapter from its path, by default its name; returns the seconds."""
    start = time.perf_counter()
    # Several calls at once: one reads and lowers an adapter while another waits for the disk.
    with TurretClient(address) as client, ThreadPoolExecutor(4) as pool:
        list(pool.map(client.adapters.load, names, paths or names))
    return time.perf_counter() - start
