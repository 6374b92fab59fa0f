"""Thousands of adapters on one server: throughput, cold loads, fairness and memory, with limits.

    python bench/lifecycle.py [--adapters 5,10,100,1000,2000,5000] [--ranks 16,64,8,32]

The benchmark starts one server per number of registered adapters (random LoRAs made by this
script), and plays the same traces in the style of S-LoRA (Gamma arrivals, power-law popularity,
fixed seed) to each in turn. On the largest server, it measures the cost of cold loads, and whether
a rare adapter is served beside a popular one. It writes one JSON document, prints it as tables, and
ends with exit code 1 if a limit was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.adapters import ALL, ATTENTION, write_random_loras
from common.machine import CpuMeter, cpu_name, describe, require_idle, slug
from common.report import RESULTS, make_console, print_rows
from rich.console import Console
from scale.bars import Bar, bars_of
from scale.cold_loads import measure_interference, probe_cold
from scale.fairness import measure_fairness
from scale.many_loras import RANKS, write_many_loras
from scale.memory_watch import MemoryWatch
from scale.registering import register, restore
from scale.replay import median_ms, replay
from scale.workload import LENGTHS, Workload, draw

from turret.server.basics.settings import parse_byte_size
from turret.server.models.decoding.arch import Arch
from turret.server.models.families import read_arch
from turret.server.models.model_source import resolve_model
from turret.server.models.sources.check import default_cache_dir
from turret.server.server_process import ServerProcess

EXIT_MISSED = 1
# The limit for the cost of a cold load uses this rank on all projections, unlike the other
# adapters.
PROBED_RANK = 16


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: the bundled model")
    parser.add_argument(
        "--adapters",
        type=lambda text: sorted(int(number) for number in text.split(",")),
        default="5,10,100,1000,2000,5000",
        help="numbers to register (default: %(default)s)",
    )
    parser.add_argument(
        "--ranks",
        type=lambda text: [int(number) for number in text.split(",")],
        default=",".join(map(str, RANKS)),
        help="ranks of the adapters, in turn (default: %(default)s)",
    )
    parser.add_argument(
        "--targets",
        choices=("attention", "all"),
        default="attention",
        help="projections of the adapters: q, k, v and o as in S-LoRA, or all seven",
    )
    parser.add_argument(
        "--lengths",
        choices=LENGTHS,
        default="s-lora",
        help="prompts of 8 to 512 tokens and 8 to 512 generated, or 16 to 64 and 8 to 32",
    )
    for flag, kind, default, text in (
        ("--requests", int, 48, "length of a trace"),
        ("--rounds", int, 4, "traces for each number of adapters"),
        ("--rate", float, 40.0, "mean arrivals per second; more than can be served"),
        ("--cv", float, 1.0, "coefficient of variation of the gaps"),
        ("--exponent", float, 1.0, "of the popularity's power law"),
        ("--probes", int, 20, "cold loads to time, and requests per interference run"),
        ("--fair-requests", int, 600, "requests of the fairness scenario"),
        ("--fair-rate", float, 100.0, "its arrivals per second; more than can be served"),
        ("--seed", int, 0, "of the traces"),
        ("--host-bytes", parse_byte_size, "1GiB", "--adapter-host-bytes of the servers"),
        ("--device-bytes", parse_byte_size, "512MiB", "--adapter-device-bytes of the servers"),
    ):
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the JSON document")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    return parser.parse_args(argv)


class Fleet:
    """One server per number of registered adapters; only the measured one is busy."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._folder = folder
        # Measure the cost of adapters; speculation would change the number of steps.
        flags = ["--adapter-root", str(folder / "adapters"), "--speculation", "off"]
        flags += ["--adapter-host-bytes", str(args.host_bytes)]
        flags += ["--adapter-device-bytes", str(args.device_bytes)]
        flags += ["--max-queued-requests", str(2 * max(args.requests, args.fair_requests))]
        if args.model is not None:
            flags += ["--model", str(args.model)]
        self._flags = flags
        self.servers: dict[int, ServerProcess] = {}
        self.memory: dict[int, MemoryWatch] = {}

    def state(self, count: int) -> Path:
        return self._folder / f"state-{count}"

    def start(self, count: int, stack: contextlib.ExitStack) -> ServerProcess:
        """Start the server for ``count`` adapters, without adapters."""
        flags = [*self._flags, "--state-dir", str(self.state(count))]
        server = stack.enter_context(ServerProcess(flags))
        server.wait()
        self.servers[count] = server
        watch = MemoryWatch(server.metrics_address, server.process.pid)
        self.memory[count] = stack.enter_context(watch)
        return server


def measure_throughput(
    args: argparse.Namespace, fleet: Fleet, names: Sequence[str], console: Console
) -> list[dict[str, Any]]:
    """Requests per second by number of adapters.

    In every round, each server plays the same trace with different adapter names. The first round
    fills the caches and does not count.
    """
    rates: dict[int, list[float]] = {count: [] for count in args.adapters}
    answers: dict[int, list[Any]] = {count: [] for count in args.adapters}
    prompt_tokens, new_tokens = LENGTHS[args.lengths]
    for number in range(args.rounds + 1):
        workload = Workload(
            num_requests=args.requests,
            rate=args.rate,
            cv=args.cv,
            exponent=args.exponent,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            seed=args.seed + number,
        )
        # The machine's speed drifts, so no number of adapters may always be measured first.
        for count in args.adapters if number % 2 else reversed(args.adapters):
            server = fleet.servers[count]
            served = replay(server.address, draw(workload, names[:count]))
            rate = len(served) / max(answer.finished for answer in served)
            console.print(f"round {number}, {count} adapters: {rate:.2f} requests/s")
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
        }
        for count in args.adapters
    ]


def measure(
    args: argparse.Namespace, folder: Path, names: list[str], probes: list[str], console: Console
) -> dict[str, Any]:
    """Measure everything; see the module's docstring."""
    largest = args.adapters[-1]
    fleet = Fleet(args, folder)
    seconds: dict[int, float] = {}
    with contextlib.ExitStack() as stack:
        for count in args.adapters:
            server = fleet.start(count, stack)
            # Register the probes first, so that the other adapters evict them from memory.
            if count == largest:
                register(server.address, probes)
            seconds[count] = register(server.address, names[:count])
            console.print(f"{count} adapters registered in {seconds[count]:.1f} s")
        restored = restore(fleet.state(largest), folder / "restored")
        registering = {
            "registered": largest,
            "seconds": round(seconds[largest], 2),
            "restore_seconds": round(restored.seconds, 2),
            "bytes_each": round(restored.bytes_each),
        }
        meter = CpuMeter(*(server.process.pid for server in fleet.servers.values()))
        address = fleet.servers[largest].address
        result = {
            "registering": registering,
            "cold": probe_cold(address, probes),
            "interference": measure_interference(address, names[0], names[1:], args.probes),
            "throughput": measure_throughput(args, fleet, names, console),
            "fairness": measure_fairness(
                address,
                names[0],
                names[1],
                count=args.fair_requests,
                rate=args.fair_rate,
                seed=args.seed,
            ),
            "foreign_cpu_share": round(meter.foreign_share(), 3),
        }
    memory = [
        {
            "registered": count,
            "host_bytes_max": watch.host_bytes,
            "device_bytes_max": watch.device_bytes,
            "rss_bytes_max": watch.rss_bytes,
            "samples": watch.num_samples,
        }
        for count, watch in fleet.memory.items()
    ]
    return result | {"memory": memory}


def show(console: Console, result: dict[str, Any], bars: Sequence[Bar]) -> None:
    memory = {row["registered"]: row for row in result["memory"]}
    rows = [
        {
            "adapters": str(row["registered"]),
            "requests/s": f"{row['requests_per_second']:.2f}",
            "rounds": " ".join(f"{rate:.2f}" for rate in row["rounds"]),
            "asked for": str(row["distinct"]),
            "cold": f"{row['cold_share']:.1%}",
            "TTFT, ms": str(row["ttft_ms"]),
            "host, MiB": f"{memory[row['registered']]['host_bytes_max'] / 2**20:.0f}",
            "device, MiB": f"{memory[row['registered']]['device_bytes_max'] / 2**20:.0f}",
            "RSS, MiB": f"{memory[row['registered']]['rss_bytes_max'] / 2**20:.0f}",
        }
        for row in result["throughput"]
    ]
    print_rows(console, "Many adapters; more requests than can be served", rows)
    for part in ("registering", "cold", "interference", "fairness"):
        shown = {key: value for key, value in result[part].items() if not isinstance(value, list)}
        console.print(f"{part}: " + ", ".join(f"{key} {value}" for key, value in shown.items()))
    verdicts = [
        {
            "bar": bar.name,
            "measured": "-" if bar.value is None else f"{bar.value:.6g}",
            "must be": f"{'≥' if bar.is_least else '≤'} {bar.limit:.6g} {bar.unit}",
            "verdict": "pass" if bar.passed else "FAIL",
        }
        for bar in bars
    ]
    print_rows(console, "Bars", verdicts)


def write_adapters(args: argparse.Namespace, root: Path, arch: Arch, base: str) -> list[list[str]]:
    """Write the adapters and the probes; returns the names of both."""
    targets = ATTENTION if args.targets == "attention" else ALL
    like: Any = {"arch": arch, "base_model": base}
    count = args.adapters[-1]
    names = write_many_loras(root, count, targets=targets, ranks=args.ranks, **like)
    probes = write_random_loras(root, args.probes, rank=PROBED_RANK, **like)
    return [names, probes]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    console = make_console()
    load = require_idle(console, args.force)
    from transformers import AutoConfig

    start = time.monotonic()
    model = resolve_model(args.model, default_cache_dir())
    arch = read_arch(AutoConfig.from_pretrained(model.files))
    with tempfile.TemporaryDirectory(prefix="turret-bench-") as scratch:
        folder = Path(scratch)
        names, probes = write_adapters(args, folder / "adapters", arch, model.name)
        result = measure(args, folder, names, probes, console)
    kept = (
        "adapters",
        "ranks",
        "targets",
        "lengths",
        "requests",
        "rounds",
        "rate",
        "cv",
        "exponent",
        "seed",
    )
    kept += ("host_bytes", "device_bytes")
    scenario = {name: getattr(args, name) for name in kept} | {"model": model.name}
    result = (
        describe() | {"bench": "lifecycle", "forced": args.force, "scenario": scenario} | result
    )
    bars = bars_of(result)
    result |= {"bars": [bar.to_json() for bar in bars]}
    result |= {"load_before": round(load, 3), "seconds": round(time.monotonic() - start)}
    out: Path = args.out or RESULTS / f"lifecycle-{slug(cpu_name())}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(console, result, bars)
    console.print(f"{result['seconds']} s; written to {out}", soft_wrap=True)
    return 0 if all(bar.passed for bar in bars) else EXIT_MISSED


if __name__ == "__main__":
    sys.exit(main())
