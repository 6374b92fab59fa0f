"""Plays a trace to a server, and measures its answers from the client's side."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from scale.workload import Arrival

from turret.clients.aio import AsyncTurretClient
from turret.clients.messages.results import AdapterUse


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
