"""Decode speed while other processes use the processors, relative to an idle machine.

    python bench/neighbours.py [--repeats 3] [--only TEXT]

Four settings are interleaved in every round: a busy Python loop, a second server under the same
load, a CFS quota of three quarters of the processors (cgroup v2, which needs root), and an idle
machine. The client runs on the same processors, as in ``decode.py``.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common.report import print_rows
from common.requests import BatchTiming, PromptSource, send_batch
from common.session import make_parser, session

from turret.clients.client import TurretClient

_BATCH = 16
_RANK = 16
_TOKENS = 64
_QUOTA_SHARE = 0.75
_PERIOD_US = 100_000
IDLE, BUSY, SERVERS, QUOTA = "idle", "busy loop", "two servers", "quota"


@dataclass(slots=True)
class Case:
    """Concurrent requests, each with an adapter or None, and the rates of the rounds by setting."""

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


def decode_rate(
    source: PromptSource, address: str, adapters: list[str | None], new_tokens: int = _TOKENS
) -> float:
    """The tokens per second of one batch, after every request has its first token."""
    prompts = source.take(len(adapters))
    return BatchTiming.of(send_batch(address, prompts, adapters, new_tokens)).decode_rate


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
def load_on(send: Callable[[], object]) -> Iterator[None]:
    """Send the same batch repeatedly to another server."""
    stopping = threading.Event()

    def repeat() -> None:
        while not stopping.is_set():
            send()

    with ThreadPoolExecutor(1) as executor:
        sending = executor.submit(repeat)
        try:
            yield
        finally:
            stopping.set()
        # Raise the error of the load, if there is one.
        sending.result()


@contextlib.contextmanager
def quota(pid: int) -> Iterator[None]:
    """Put the server, but not its client, into a control group with a quota.

    Raises:
        OSError: The controller is missing, or this user may not use it.
    """
    parent = Path("/sys/fs/cgroup")
    group = parent / f"turret-bench-{os.getpid()}"
    group.mkdir()
    try:
        quota_us = int(_QUOTA_SHARE * (os.cpu_count() or 1) * _PERIOD_US)
        (group / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        (parent / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def has_quota() -> bool:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            with quota(process.pid):
                return True
        except OSError:
            return False
        finally:
            process.kill()


def main(argv: list[str] | None = None) -> int:
    args = make_parser(__doc__, 3).parse_args(argv)
    with session("neighbours", args) as run, contextlib.ExitStack() as stack:
        loras = run.write.loras(_BATCH, _RANK)
        cases = [case for case in make_cases(loras) if args.only in case.name]
        one, other = (stack.enter_context(run.serving(loras)) for _ in range(2))
        client = stack.enter_context(TurretClient(one.address))
        source = PromptSource(client, _TOKENS)

        def rate(case: Case, address: str, new_tokens: int = _TOKENS) -> float:
            return decode_rate(source, address, case.adapters, new_tokens)

        for case in cases:
            for server in (one, other):
                rate(case, server.address, 8)
        settings = [IDLE, BUSY, SERVERS] + ([QUOTA] if has_quota() else [])
        for _ in range(args.repeats):
            for case in cases:
                around = {
                    IDLE: contextlib.nullcontext,
                    BUSY: busy_loop,
                    SERVERS: lambda case=case: load_on(lambda: rate(case, other.address)),
                    QUOTA: lambda: quota(one.process.pid),
                }
                for setting in settings:
                    with around[setting]():
                        case.rates.setdefault(setting, []).append(rate(case, one.address))
        rows = []
        for case in cases:
            row = {"case": case.name, "idle, tokens/s": f"{case.median(IDLE):.0f}"}
            for setting in settings[1:]:
                share = case.median(setting) / case.median(IDLE)
                all_rates = ", ".join(f"{rate:.0f}" for rate in case.rates[setting])
                row[setting] = f"{share:.2f} ({all_rates})"
            rows.append(row)
        print_rows(run.console, "Decode rates under load, relative to idle; medians", rows)
        run.save([({"name": c.name, "rank": _RANK}, {"rates": c.rates}) for c in cases])
    return 0


if __name__ == "__main__":
    sys.exit(main())
