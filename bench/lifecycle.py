"""Thousands of adapters on one server: throughput, cold loads, fairness and memory.

    python bench/lifecycle.py [--adapters 5,10,100,1000,2000,5000] [--ranks 16,64,8,32]

The benchmark starts one server per number of registered adapters (random LoRAs), and plays the same
traces in the style of S-LoRA (Gamma arrivals, power-law popularity, fixed seed) to each in turn. On
the largest server, it measures the cost of cold loads, and whether a rare adapter is served
alongside a popular one. It writes one JSON document, and prints it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import statistics
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from common.adapters import ATTENTION
from common.machine import CpuMeter, cpu_name, describe, slug
from common.report import RESULTS, print_rows
from common.requests import register
from common.session import Session, make_parser, session
from common.traces import LENGTHS, TOKEN_IDS, Arrival, Served, Workload, draw, median_ms, replay
from prometheus_client.parser import text_string_to_metric_families

from turret.clients.client import TurretClient
from turret.server.basics.settings import parse_byte_size
from turret.server.server_process import ServerProcess

# In this order, the popular adapters have about the mean rank of all: weighted by popularity, 27
# for five adapters, 29 for ten, 30 for more. Traces for few and for many adapters then differ only
# in the number of adapters. In ascending order, the mean rank of five adapters would be 19.
RANKS = (16, 64, 8, 32)
# The adapters whose cold loads are timed have this rank on all projections.
PROBED_RANK = 16
_NUM_FILES = 16
_PROMPT_TOKENS = 32
# Requests per second for the resident adapter; the others get the same rate together.
_RATE = 4.0
_PAIRS = 9
# First token of prompts that are played twice. The second time, this token differs, so that the
# prefix cache does not have the prompts' blocks.
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
    """The time to first token of a resident adapter, alongside requests for cold and warm adapters.

    The same requests for the same other adapters are played twice at the same times, with one
    prompt token changed. The first time, each of these adapters is cold and must be read; the
    second time, it is in memory. Only the reads differ.

    Args:
        address: The address of the server.
        resident: The measured adapter, which is pinned during the measurement.
        others: Other adapters, of which only the cold ones are used.
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
    token_ids: range = TOKEN_IDS,
) -> dict[str, Any]:
    """The queue times of two adapters by the server's clock, if one has nine in ten requests.

    Args:
        address: The address of the server.
        popular: The adapter of nine in ten requests.
        rare: The adapter of the other requests.
        count: The number of all requests.
        rate: Arrivals per second, clearly more than the server can answer.
        token_ids: The token ids for prompts.
    """
    source = random.Random(0)
    workload = Workload(
        num_requests=count,
        rate=rate,
        prompt_tokens=(16, 32),
        new_tokens=(8, 8),
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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, 4)
    for flag, default, text in (
        ("--adapters", "5,10,100,1000,2000,5000", "numbers of adapters to register"),
        ("--ranks", ",".join(map(str, RANKS)), "ranks of the adapters, in turn"),
    ):
        parser.add_argument(
            flag,
            type=lambda text: [int(number) for number in text.split(",")],
            default=default,
            help=f"{text} (default: %(default)s)",
        )
    parser.add_argument(
        "--lengths",
        choices=LENGTHS,
        default="s-lora",
        help="prompts of 8 to 512 tokens and 8 to 512 generated, or 16 to 64 and 8 to 32",
    )
    for flag, kind, default, text in (
        ("--requests", int, 48, "length of a trace"),
        ("--rate", float, 40.0, "mean arrivals per second; more than can be served"),
        ("--probes", int, 20, "cold loads to time, and requests per interference run"),
        ("--fair-requests", int, 600, "requests of the fairness scenario"),
        ("--fair-rate", float, 100.0, "its arrivals per second; more than can be served"),
        ("--host-bytes", parse_byte_size, "1GiB", "--adapter-host-bytes of the servers"),
        ("--device-bytes", parse_byte_size, "512MiB", "--adapter-device-bytes of the servers"),
    ):
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default: {default})")
    return parser.parse_args(argv)


def start(run: Session, count: int, stack: contextlib.ExitStack) -> ServerProcess:
    """Start the server for ``count`` adapters, which are not loaded yet."""
    args = run.args
    flags = ["--state-dir", str(run.write.root / f"state-{count}")]
    flags += ["--adapter-host-bytes", str(args.host_bytes)]
    flags += ["--adapter-device-bytes", str(args.device_bytes)]
    flags += ["--max-queued-requests", str(2 * max(args.requests, args.fair_requests))]
    return stack.enter_context(run.serving([], *flags))


def memory_of(server: ServerProcess) -> dict[str, int]:
    """The bytes of adapter weights by tier, and the resident set of the process."""
    address = f"http://{server.metrics_address}/metrics"
    with urllib.request.urlopen(address, timeout=10) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    held = {
        f"{sample.labels['tier']}_bytes": int(sample.value)
        for family in families
        for sample in family.samples
        if sample.name == "turret_adapter_bytes"
    }
    return held | {"rss_bytes": psutil.Process(server.process.pid).memory_info().rss}


def measure_throughput(
    run: Session, servers: dict[int, ServerProcess], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Requests per second by number of adapters, and the memory that the servers then use.

    In every round, each server plays the same trace with different adapter names. The first round
    fills the caches and does not count.
    """
    args = run.args
    rates: dict[int, list[float]] = {count: [] for count in servers}
    answers: dict[int, list[Served]] = {count: [] for count in servers}
    prompt_tokens, new_tokens = LENGTHS[args.lengths]
    for number in range(args.repeats + 1):
        workload = Workload(
            num_requests=args.requests,
            rate=args.rate,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            seed=number,
        )
        # The machine's speed drifts, so no number of adapters may always be measured first.
        for count in servers if number % 2 else reversed(servers):
            served = replay(servers[count].address, draw(workload, names[:count]))
            rate = len(served) / max(answer.finished for answer in served)
            run.console.print(f"round {number}, {count} adapters: {rate:.2f} requests/s")
            if number:
                rates[count].append(rate)
                answers[count] += served
    return [
        {
            "registered": count,
            # Computed from totals, because every round has the same number of requests.
            "requests_per_second": round(len(rates[count]) / sum(1 / r for r in rates[count]), 3),
            "rounds": [round(rate, 3) for rate in rates[count]],
            "distinct": len({answer.adapter for answer in answers[count]}),
            "cold_share": round(sum(a.is_cold for a in answers[count]) / len(answers[count]), 3),
            "ttft_ms": median_ms([answer.seconds_to_first for answer in answers[count]]),
            **memory_of(server),
        }
        for count, server in servers.items()
    ]


def measure(run: Session, names: list[str], probes: list[str]) -> dict[str, Any]:
    """Measure everything; see the module's docstring."""
    args, seconds = run.args, 0.0
    servers: dict[int, ServerProcess] = {}
    with contextlib.ExitStack() as stack:
        for count in sorted(args.adapters):
            servers[count] = start(run, count, stack)
            # Register the probes first, so that the other adapters evict them from memory.
            if count == len(names):
                register(servers[count].address, probes)
            seconds = register(servers[count].address, names[:count])
            run.console.print(f"{count} adapters registered in {seconds:.1f} s")
        meter = CpuMeter(*(server.process.pid for server in servers.values()))
        address = servers[len(names)].address
        return {
            "registering_seconds": round(seconds, 2),
            "cold": probe_cold(address, probes),
            "interference": measure_interference(address, names[0], names[1:], args.probes),
            "throughput": measure_throughput(run, servers, names),
            "fairness": measure_fairness(
                address, names[0], names[1], count=args.fair_requests, rate=args.fair_rate
            ),
            "foreign_cpu_share": round(meter.foreign_share(), 3),
        }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with session("lifecycle", args) as run:
        most = max(args.adapters)
        names = run.write.many_loras(most, args.ranks, ATTENTION, _NUM_FILES)
        result = measure(run, names, run.write.loras(args.probes, PROBED_RANK))
        mib = lambda value: f"{value / 2**20:.0f}" if value > 2**20 else str(value)  # noqa: E731
        rows = [
            {k.removesuffix("_bytes"): mib(v) if "bytes" in k else str(v) for k, v in row.items()}
            for row in result["throughput"]
        ]
        print_rows(run.console, "Many adapters; more requests than can be served; MiB", rows)
        for part in ("cold", "interference", "fairness"):
            run.console.print(f"{part}: {result[part]}")
        if not args.no_save:
            kept = ("adapters", "ranks", "lengths", "requests", "repeats", "rate", "host_bytes")
            scenario = {name: getattr(args, name) for name in (*kept, "device_bytes")}
            scenario["model"] = run.base.source.name
            out: Path = RESULTS / f"lifecycle-{slug(cpu_name())}.json"
            document = describe() | {"scenario": scenario} | result
            out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            run.console.print(f"written to {out}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
