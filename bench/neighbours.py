"""Decode speed while other processes use the processors, relative to an idle machine.

    python bench/neighbours.py [--repeats 3] [--only TEXT]

Four settings are interleaved in every round: a busy Python loop, a second server under the same
load, a CFS quota of three quarters of the processors (cgroup v1 or v2, which needs root), and an
idle machine. The client runs on the same processors, as in ``decode.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common.adapters import write_random_loras
from common.machine import describe, require_idle
from common.report import append_rows, make_console, print_rows
from common.served import Served

from turret.server.models.families import read_arch
from turret.server.models.model_source import resolve_model
from turret.server.models.sources.check import default_cache_dir

_BATCH = 16
_RANK = 16
_QUOTA_SHARE = 0.75
_PERIOD_US = 100_000
IDLE, BUSY, SERVERS, QUOTA = "idle", "busy loop", "two servers", "quota"


@dataclass(slots=True)
class Case:
    """Concurrent requests with an adapter or None each, and the rates of the rounds by setting."""

    name: str
    adapters: list[str | None]
    rates: dict[str, list[float]] = field(default_factory=dict)

    def median(self, setting: str) -> float:
        return statistics.median(self.rates[setting])


def make_cases(loras: list[str]) -> list[Case]:
    return [
        Case("base, 1 request", [None]),
        Case(f"base, {_BATCH} requests", [None] * _BATCH),
        Case("one adapter, 1 request", [loras[0]]),
        Case(f"{_BATCH} adapters, {_BATCH} requests", list(loras)),
    ]


@contextlib.contextmanager
def busy_loop() -> Iterator[None]:
    """A process that computes endlessly."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def load_on(other: Served, adapters: list[str | None]) -> Iterator[None]:
    """Send the same batch repeatedly to another server."""
    stopping = threading.Event()

    def send() -> None:
        while not stopping.is_set():
            other.rate(adapters)

    with ThreadPoolExecutor(1) as executor:
        sending = executor.submit(send)
        time.sleep(0.5)
        try:
            yield
        finally:
            stopping.set()
        # Raise the load's error, if it failed.
        sending.result()


@contextlib.contextmanager
def quota(pid: int) -> Iterator[None]:
    """Put the server, but not its client, into a control group with a quota.

    Raises:
        OSError: The controller is missing, or this user may not use it.
    """
    quota_us = int(_QUOTA_SHARE * (os.cpu_count() or 1) * _PERIOD_US)
    old = Path("/sys/fs/cgroup/cpu")
    parent = old if old.is_dir() else Path("/sys/fs/cgroup")
    group = parent / f"turret-bench-{os.getpid()}"
    group.mkdir()
    try:
        if parent == old:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        else:
            (group / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        (parent / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def has_quota() -> bool:
    try:
        with subprocess.Popen(["sleep", "60"]) as process:
            try:
                with quota(process.pid):
                    return True
            finally:
                process.kill()
    except OSError:
        return False


def run_round(case: Case, served: Served, other: Served, settings: list[str]) -> None:
    around = {
        IDLE: contextlib.nullcontext,
        BUSY: busy_loop,
        SERVERS: lambda: load_on(other, case.adapters),
        QUOTA: lambda: quota(served.pid),
    }
    for setting in settings:
        with around[setting]():
            case.rates.setdefault(setting, []).append(served.rate(case.adapters))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median counts")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="run only cases with TEXT in their names"
    )
    parser.add_argument(
        "--setting", default="", metavar="TEXT", help="run only settings with TEXT in their names"
    )
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--no-save", action="store_true", help="do not store the results")
    args = parser.parse_args(argv)
    console = make_console()
    load = require_idle(console, args.force)
    from transformers import AutoConfig

    model = resolve_model(None, default_cache_dir())
    arch = read_arch(AutoConfig.from_pretrained(model.files))
    settings = [IDLE, BUSY, SERVERS] + ([QUOTA] if has_quota() else [])
    settings = [s for s in settings if s == IDLE or args.setting in s]
    with (
        tempfile.TemporaryDirectory(prefix="turret-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        root = Path(folder)
        loras = write_random_loras(root, _BATCH, rank=_RANK, arch=arch, base_model=model.name)
        cases = [case for case in make_cases(loras) if args.only in case.name]
        servers = []
        for _ in range(2):
            servers.append(Served(root, loras))
            stack.callback(servers[-1].stop)
        idle_share = servers[0].idle_share()
        for case in cases:
            for served in servers:
                served.rate(case.adapters, 8)
        for _ in range(args.repeats):
            for case in cases:
                run_round(case, servers[0], servers[1], settings)
    rows = []
    for case in cases:
        row = {"case": case.name, "idle, tokens/s": f"{case.median(IDLE):.0f}"}
        for setting in settings[1:]:
            share = case.median(setting) / case.median(IDLE)
            all_rates = ", ".join(f"{rate:.0f}" for rate in case.rates[setting])
            row[setting] = f"{share:.2f} ({all_rates})"
        rows.append(row)
    print_rows(console, "Decode beside others, of the idle rate; medians", rows)
    console.print(f"a server that nobody asks uses {idle_share:.1%} of a processor")
    if not args.no_save:
        common = describe() | {"bench": "neighbours", "forced": args.force, "load_before": load}
        saved = [
            common
            | {
                "scenario": {"name": case.name, "model": model.name, "rank": _RANK},
                "values": {"rates": {k: [round(r, 1) for r in v] for k, v in case.rates.items()}},
            }
            for case in cases
        ]
        console.print(f"results added to {append_rows(saved)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
