"""A rare adapter beside a popular one that alone overloads the server."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scale.replay import Served, replay
from scale.workload import TOKEN_IDS, Workload, draw

POPULAR_SHARE = 0.9


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that is not exceeded by a share ``q`` of all values."""
    return sorted(values)[math.ceil(q * len(values)) - 1]


def measure_fairness(
    address: str,
    popular: str,
    rare: str,
    *,
    count: int,
    rate: float,
    seed: int = 0,
    token_ids: range = TOKEN_IDS,
) -> dict[str, Any]:
    """The queue times of both adapters by the server's clock, with nine in ten requests for one.

    Args:
        address: The address of the server.
        popular: The adapter of nine in ten requests.
        rare: The adapter of the other requests.
        count: The number of all requests.
        rate: Arrivals per second, clearly more than the server can answer.
        seed: The seed of the trace.
        token_ids: The token ids for prompts.
    """
    source = random.Random(seed)
    workload = Workload(
        num_requests=count,
        rate=rate,
        prompt_tokens=(16, 32),
        new_tokens=(8, 8),
        seed=seed,
        token_ids=token_ids,
    )
    trace = [
        replace(arrival, adapter=popular if source.random() < POPULAR_SHARE else rare)
        for arrival in draw(workload, [popular])
    ]
    served = replay(address, trace)
    waits = {name: _waits(served, name) for name in (popular, rare)}
    p50_popular = quantile(waits[popular], 0.5)
    p99_rare = quantile(waits[rare], 0.99)
    return {
        "requests": count,
        "rare_requests": len(waits[rare]),
        "arrivals_per_second": rate,
        "answers_per_second": round(count / max(answer.finished for answer in served), 2),
        "queue_popular_p50_ms": round(1e3 * p50_popular, 1),
        "queue_popular_p99_ms": round(1e3 * quantile(waits[popular], 0.99), 1),
        "queue_rare_p50_ms": round(1e3 * quantile(waits[rare], 0.5), 1),
        "queue_rare_p99_ms": round(1e3 * p99_rare, 1),
        "ratio": round(p99_rare / p50_popular, 3),
    }


def _waits(served: Sequence[Served], adapter: str) -> list[float]:
    return [answer.queue_seconds for answer in served if answer.adapter == adapter]
