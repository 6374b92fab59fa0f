"""Many registered adapters: throughput, time to first token, cold loads and memory.

    python bench/lifecycle.py [--adapters 10,100,1000,5000] [--requests 400]

Registers more and more random LoRA adapters (ranks 8, 16, 32, 64) with one server. For each number
it plays a trace (Gamma arrivals, power-law popularity, fixed seed) faster than the server can
answer, probes what a cold adapter costs, and measures whether cold loads of others delay requests
for an adapter that is there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import BUSY_SHARE, CpuMeter, describe, measure_load
from many_loras import rank_of, write_many_loras
from memory_watch import MemoryWatch
from replay import median_ms, replay
from report import append_rows, make_console, print_rows
from rich.console import Console
from workload import Arrival, Workload, draw

from turret.clients.client import TurretClient
from turret.clients.errors import TurretRpcError
from turret.server.config import parse_byte_size
from turret.server.models.arch import read_arch
from turret.server.models.nf4_cache import default_cache_dir, resolve_model
from turret.server.server_process import ServerProcess

EXIT_BUSY = 3
# What the bar for the price of a cold load is about.
PROBED_RANK = 16


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: the embedded model")
    parser.add_argument("--adapters", default="10,100,1000,5000", help="numbers to register")
    for flag, kind, default, text in (
        ("--requests", int, 400, "length of the trace"),
        ("--rate", float, 40.0, "mean arrivals per second; more than can be served"),
        ("--cv", float, 1.0, "coefficient of variation of the gaps"),
        ("--exponent", float, 1.0, "of the popularity's power law"),
        ("--probes", int, 20, "cold loads to time, and requests per interference run"),
        ("--seed", int, 0, "of the trace"),
        ("--host-bytes", parse_byte_size, "1GiB", "--adapter-host-bytes of the server"),
        ("--device-bytes", parse_byte_size, "512MiB", "--adapter-device-bytes of the server"),
    ):
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--no-save", action="store_true", help="keep no results")
    args = parser.parse_args(argv)
    args.adapters = sorted(int(number) for number in args.adapters.split(","))
    return args


def register(client: TurretClient, names: list[str]) -> float | None:
    """Load all; returns milliseconds each, or None if there was nothing to do."""
    start = time.perf_counter()
    for name in names:
        client.adapters.load(name, name)
    return round(1e3 * (time.perf_counter() - start) / len(names), 2) if names else None


def cold_names(client: TurretClient, names: list[str], rank: int | None = None) -> list[str]:
    """Those that are on disk alone, by name."""
    cold = {adapter.name for adapter in client.adapters.list(residency="disk", page_size=1000)}
    return [n for i, n in enumerate(names) if n in cold and rank in (None, rank_of(i))]


def probe_cold(server: ServerProcess, names: list[str], count: int) -> dict[str, Any]:
    """What one request pays for its own cold adapter, with nothing else to do for the server."""
    with TurretClient(server.address) as client:
        probed = cold_names(client, names, PROBED_RANK)[:count]
    penalties, loads = [], []
    for number, name in enumerate(probed):
        trace = [
            Arrival(0.0, name, tuple(range(2000 + 40 * turn, 2032 + 40 * turn)), 1)
            for turn in (2 * number, 2 * number + 1)
        ]
        # One after the other: the first finds the adapter cold, the second does not.
        cold, warm = (replay(server.address, [arrival])[0] for arrival in trace)
        if cold.is_cold:
            penalties.append(cold.seconds_to_first - warm.seconds_to_first)
            loads.append(cold.load_seconds)
    return {
        "cold_probes": len(penalties),
        "cold_penalty_ms": median_ms(penalties),
        "cold_load_ms": median_ms(loads),
    }


@contextmanager
def loading_others(address: str, names: list[str], loads: list[str]) -> Iterator[None]:
    """Reads one cold adapter after the other from disk, as fast as the server does it."""
    stop = threading.Event()

    def run() -> None:
        with TurretClient(address) as client:
            while not stop.is_set():
                # A pin reads the weights and computes nothing.
                for name in cold_names(client, names)[:8]:
                    if stop.is_set():
                        return
                    try:
                        client.adapters.pin(name)
                        client.adapters.unpin(name)
                    except TurretRpcError:
                        return
                    loads.append(name)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def measure_interference(server: ServerProcess, names: list[str], count: int) -> dict[str, Any]:
    """Time to first token of a resident adapter, without and with cold loads of others."""
    resident, others = names[0], names[1:]
    workload = Workload(num_requests=count, rate=4.0, prompt_tokens=(32, 32), new_tokens=(4, 4))
    medians: dict[str, list[float]] = {}
    loads: list[str] = []
    with TurretClient(server.address) as client:
        client.adapters.pin(resident)
        for seed, kind in enumerate(("quiet", "loading", "quiet", "loading")):
            trace = draw(replace(workload, seed=100 + seed), [resident])
            if kind == "quiet":
                served = replay(server.address, trace)
            else:
                with loading_others(server.address, others, loads):
                    served = replay(server.address, trace)
            medians.setdefault(kind, []).extend(s.seconds_to_first for s in served)
        client.adapters.unpin(resident)
    return {
        "ttft_resident_ms": median_ms(medians["quiet"]),
        "ttft_resident_during_loads_ms": median_ms(medians["loading"]) if loads else None,
        "interfering_loads": len(loads),
    }


def measure(
    args: argparse.Namespace, server: ServerProcess, names: list[str], registered: int
) -> dict[str, Any]:
    """One row: everything about ``names``, of which ``registered`` are loaded already."""
    with TurretClient(server.address) as client:
        load_ms = register(client, names[registered:])
    workload = Workload(
        num_requests=args.requests,
        rate=args.rate,
        cv=args.cv,
        exponent=args.exponent,
        seed=args.seed,
    )
    meter = CpuMeter(server.process.pid)
    with MemoryWatch(server.metrics_address, server.process.pid) as memory:
        served = replay(server.address, draw(workload, names))
        seconds = max(answer.finished for answer in served)
        probes = probe_cold(server, names, args.probes)
        interference = measure_interference(server, names, args.probes)
    warm = [answer.seconds_to_first for answer in served if not answer.is_cold]
    cold = [answer.seconds_to_first for answer in served if answer.is_cold]
    return {
        "registered": len(names),
        "register_ms": load_ms,
        "requests_per_second": round(len(served) / seconds, 2),
        "cold_share": round(len(cold) / len(served), 3),
        "ttft_warm_ms": median_ms(warm),
        "ttft_cold_ms": median_ms(cold),
        "host_mib_max": round(memory.host_bytes / 2**20, 1),
        "device_mib_max": round(memory.device_bytes / 2**20, 1),
        "within_budgets": memory.host_bytes <= args.host_bytes
        and memory.device_bytes <= args.device_bytes,
        "rss_mib_max": round(memory.rss_bytes / 2**20, 1),
        "memory_samples": memory.num_samples,
        "foreign_cpu_share": round(meter.foreign_share(), 3),
        **probes,
        **interference,
    }


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    columns = {
        "adapters": "registered",
        "load, ms": "register_ms",
        "requests/s": "requests_per_second",
        "cold": "cold_share",
        "first, ms": "ttft_warm_ms",
        "cold first, ms": "ttft_cold_ms",
        "r=16 cold costs, ms": "cold_penalty_ms",
        "alone, ms": "ttft_resident_ms",
        "beside loads, ms": "ttft_resident_during_loads_ms",
        "host MiB": "host_mib_max",
        "RSS MiB": "rss_mib_max",
        "others": "foreign_cpu_share",
    }
    table = [
        {title: "-" if row[key] is None else f"{row[key]}" for title, key in columns.items()}
        for row in rows
    ]
    print_rows(console, "Many adapters; medians of the time to the first token", table)
    for row in rows:
        if not row["within_budgets"]:
            console.print(f"{row['registered']} adapters: a byte budget was exceeded")


def run(args: argparse.Namespace, console: Console, root: Path, names: list[str]) -> list[dict]:
    flags = ["--adapter-root", str(root), "--state-dir", str(root.parent / "state")]
    flags += ["--adapter-host-bytes", str(args.host_bytes)]
    flags += ["--adapter-device-bytes", str(args.device_bytes)]
    flags += ["--max-queued-requests", str(args.requests + 1)]
    if args.model is not None:
        flags += ["--model", str(args.model)]
    rows = []
    with ServerProcess(flags) as server:
        server.wait()
        registered = 0
        for count in args.adapters:
            rows.append(measure(args, server, names[:count], registered))
            registered = count
            ratio = rows[-1]["requests_per_second"] / rows[0]["requests_per_second"]
            console.print(f"{count} adapters: {ratio:.2f} of the requests/s at {args.adapters[0]}")
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    console = make_console()
    load = measure_load()
    if load > BUSY_SHARE and not args.force:
        console.print(f"others take {load:.0%} of this machine's cores: wait, or --force")
        return EXIT_BUSY
    from transformers import AutoConfig

    model = resolve_model(args.model, default_cache_dir())
    arch = read_arch(AutoConfig.from_pretrained(model.files))
    with tempfile.TemporaryDirectory(prefix="turret-bench-") as folder:
        root = Path(folder) / "adapters"
        names = write_many_loras(root, args.adapters[-1], arch=arch, base_model=model.name)
        rows = run(args, console, root, names)
    show(console, rows)
    if not args.no_save:
        common = describe() | {
            "bench": "lifecycle",
            "forced": args.force,
            "load_before": round(load, 3),
        }
        kept = ("requests", "rate", "cv", "exponent", "seed", "host_bytes", "device_bytes")
        scenario = {name: getattr(args, name) for name in kept} | {"model": model.name}
        saved = [common | {"scenario": scenario, "values": row} for row in rows]
        console.print(f"results added to {append_rows(saved)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
