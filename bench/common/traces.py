"""Traces in the style of S-LoRA (arXiv 2311.03285, section 7), and their replay to a server."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from turret.clients.aio import AsyncTurretClient
from turret.clients.results import AdapterUse

# Ranges of the lengths of prompts and answers: those of S-LoRA, and short ones, for which the cost
# per request dominates.
LENGTHS = {"s-lora": ((8, 512), (8, 512)), "short": ((16, 64), (8, 32))}

# Ids below these are special tokens or bytes in the vocabularies of the models served here.
TOKEN_IDS = range(1000, 20000)


@dataclass(frozen=True, slots=True)
class Workload:
    """The parameters of a trace.

    Attributes:
        num_requests: The number of requests.
        rate: The mean number of arrivals per second.
        cv: Coefficient of variation of the Gamma-distributed gaps; 1 is a Poisson process.
        prompt_tokens: The shortest and the longest prompt.
        new_tokens: The minimum and the maximum number of generated tokens.
        seed: The seed of the trace.
        token_ids: The token ids for prompts.
    """

    num_requests: int
    rate: float
    cv: float = 1.0
    prompt_tokens: tuple[int, int] = (16, 64)
    new_tokens: tuple[int, int] = (8, 32)
    seed: int = 0
    token_ids: range = TOKEN_IDS


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request; ``seconds`` counts from the start of the trace."""

    seconds: float
    adapter: str
    prompt: tuple[int, ...]
    new_tokens: int


def draw(workload: Workload, adapters: Sequence[str]) -> list[Arrival]:
    """The trace. The ``i``-th of ``adapters`` has a popularity of ``1 / i``."""
    source = random.Random(workload.seed)
    shape = 1.0 / workload.cv**2
    scale = 1.0 / (workload.rate * shape)
    weights = [rank**-1.0 for rank in range(1, len(adapters) + 1)]
    names = source.choices(adapters, weights, k=workload.num_requests)
    trace, now = [], 0.0
    for name in names:
        now += source.gammavariate(shape, scale)
        length = source.randint(*workload.prompt_tokens)
        prompt = tuple(source.choice(workload.token_ids) for _ in range(length))
        trace.append(Arrival(now, name, prompt, source.randint(*workload.new_tokens)))
    return trace


@dataclass(frozen=True, slots=True)
class Served:
    """One answered request.

    Attributes:
        adapter: The adapter of the request.
        seconds_to_first: The time from sending the request to its first token.
        finished: The time of the last token, in seconds from the start of the trace.
        is_cold: Whether the adapter had to be read for this request.
        load_seconds: The duration of that read; 0 if the adapter was not cold.
        queue_seconds: The time in the queue, by the server's clock.
    """

    adapter: str
    seconds_to_first: float
    finished: float
    is_cold: bool
    load_seconds: float
    queue_seconds: float


def replay(address: str, trace: Sequence[Arrival]) -> list[Served]:
    """Send every request at its time, independently of earlier requests.

    Raises:
        TurretRpcError: A request failed.
        ValueError: An answer does not have the requested length.
    """

    async def play() -> list[Served]:
        async with AsyncTurretClient(address) as client:
            # Connect first, so that the time does not include it.
            await client.get_model()
            start = time.perf_counter()
            return await asyncio.gather(*(_send(client, start, arrival) for arrival in trace))

    return asyncio.run(play())


async def _send(client: AsyncTurretClient, start: float, arrival: Arrival) -> Served:
    await asyncio.sleep(max(start + arrival.seconds - time.perf_counter(), 0.0))
    sent = time.perf_counter()
    first, count = 0.0, 0
    uses: list[AdapterUse] = []
    queued = 0.0
    stream = client.generate_stream(
        list(arrival.prompt),
        adapters=arrival.adapter,
        temperature=0.0,
        max_tokens=arrival.new_tokens,
        ignore_eos=True,
        token_ids=True,
    )
    async with stream:
        async for chunk in stream:
            if chunk.token_ids and not count:
                first = time.perf_counter() - sent
            count += len(chunk.token_ids)
            uses += chunk.adapters_used
            queued = queued if chunk.timing is None else chunk.timing.queue
    if count != arrival.new_tokens:
        raise ValueError(f"asked for {arrival.new_tokens} tokens, got {count}")
    return Served(
        adapter=arrival.adapter,
        seconds_to_first=first,
        finished=time.perf_counter() - start,
        is_cold=uses[0].cold_start,
        load_seconds=uses[0].load_ms / 1e3,
        queue_seconds=queued,
    )


def median_ms(values: Sequence[float]) -> float | None:
    """The median of seconds, in milliseconds; None for no values."""
    return round(1e3 * statistics.median(values), 2) if values else None
