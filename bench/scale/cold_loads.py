"""The cost of a cold adapter for its own request and for other requests."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scale.replay import Served, median_ms, replay
from scale.workload import Arrival, Workload, draw

from turret.clients.client import TurretClient

_PROMPT_TOKENS = 32
# Requests per second for the resident adapter; the others get the same rate together.
_RATE = 4.0
_PAIRS = 9
# First token of prompts that are played twice: another first token keeps their blocks out of the
# prefix cache.
_FIRST_TOKEN = 700


def cold_among(address: str, names: Sequence[str]) -> list[str]:
    """The names of the adapters that are only on disk, in the given order."""
    with TurretClient(address) as client:
        cold = {adapter.name for adapter in client.adapters.list(residency="disk", page_size=1000)}
    return [name for name in names if name in cold]


def probe_cold(address: str, names: Sequence[str]) -> dict[str, Any]:
    """The cost of a cold adapter for its own request, on an otherwise idle server.

    Args:
        address: The address of the server.
        names: Adapters of the probed rank. Each cold one is requested twice in sequence, so that
            the second request finds it in memory.
    """
    penalties, loads = [], []
    for number, name in enumerate(cold_among(address, names)):
        # Give every request its own prompt, so that the prefix cache does not help.
        firsts = [2000 + 2 * _PROMPT_TOKENS * number, 2000 + 2 * _PROMPT_TOKENS * number + 33]
        cold, warm = (
            replay(address, [Arrival(0.0, name, tuple(range(at, at + _PROMPT_TOKENS)), 1)])[0]
            for at in firsts
        )
        if cold.is_cold and not warm.is_cold:
            penalties.append(cold.seconds_to_first - warm.seconds_to_first)
            loads.append(cold.load_seconds)
    return {
        "probes": len(penalties),
        "penalty_ms": median_ms(penalties),
        "penalty_ms_each": [round(1e3 * seconds, 2) for seconds in penalties],
        "load_ms": median_ms(loads),
    }


def measure_interference(
    address: str, resident: str, others: Sequence[str], count: int
) -> dict[str, Any]:
    """The time to first token of a resident adapter, beside requests for cold and warm adapters.

    The same requests for the same other adapters are played twice at the same times, with one
    prompt token changed. The first time, each of these adapters is cold and must be read; the
    second time, it is in memory. Only the reads differ.

    Args:
        address: The address of the server.
        resident: The measured adapter, which is pinned during the measurement.
        others: Adapters of which enough are cold.
        count: The number of requests of each kind in a run.
    """
    first: dict[bool, list[float]] = {True: [], False: []}
    num_cold = 0
    workload = Workload(
        num_requests=count,
        rate=_RATE,
        prompt_tokens=(_PROMPT_TOKENS, _PROMPT_TOKENS),
        new_tokens=(4, 4),
    )
    with TurretClient(address) as client:
        client.adapters.pin(resident)
        cold = iter(cold_among(address, others))
        for pair in range(_PAIRS):
            names = list(itertools.islice(cold, count))
            if len(names) < count:
                break
            timed = draw(replace(workload, seed=2 * pair), [resident])
            beside = draw(replace(workload, seed=2 * pair + 1), names)
            # Use each adapter exactly once, regardless of the draw.
            beside = [replace(a, adapter=n) for a, n in zip(beside, names, strict=True)]
            trace = sorted(timed + beside, key=lambda a: a.seconds)
            for are_cold in (True, False):
                served = replay(address, [_begin_with(_FIRST_TOKEN + are_cold, a) for a in trace])
                ours, rest = _split(served, resident)
                first[are_cold] += [answer.seconds_to_first for answer in ours]
                if are_cold:
                    num_cold += sum(answer.is_cold for answer in rest)
        client.adapters.unpin(resident)
    ratio = None
    if first[True]:
        ratio = round(statistics.median(first[True]) / statistics.median(first[False]), 3)
    return {
        "requests": len(first[True]),
        "cold_loads": num_cold,
        "ttft_beside_cold_ms": median_ms(first[True]),
        "ttft_beside_warm_ms": median_ms(first[False]),
        "ratio": ratio,
    }


def _begin_with(token: int, arrival: Arrival) -> Arrival:
    """The same request with a prompt that shares no prefix with any drawn one."""
    return replace(arrival, prompt=(token, *arrival.prompt[1:]))


def _split(served: Sequence[Served], adapter: str) -> tuple[list[Served], list[Served]]:
    mine = [answer for answer in served if answer.adapter == adapter]
    return mine, [answer for answer in served if answer.adapter != adapter]
