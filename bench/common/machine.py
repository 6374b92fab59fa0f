"""The machine of a measurement, and the check that it is idle."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

import turret

ROOT = Path(__file__).resolve().parents[2]
# Share of the machine that other processes may use before a measurement is worthless.
BUSY_SHARE = 0.1
EXIT_BUSY = 3
_WATCHED_SECONDS = 3.0
_PACKAGES = ("torch", "bitsandbytes", "transformers", "grpcio", "protobuf")


def cpu_name() -> str:
    """The model name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def slug(text: str) -> str:
    """``AMD EPYC 9655`` → ``amd-epyc-9655``, for file names."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def commit() -> str:
    """The short hash of HEAD, followed by ``+`` if files differ from it; empty outside of git."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def describe() -> dict[str, Any]:
    """The part of a result that describes its machine."""
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "versions": {
            "turret": turret.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    }


class CpuMeter:
    """Measures the share of the machine's cores that other processes use.

    Args:
        pids: Processes that do not count as others, in addition to this one.
    """

    def __init__(self, *pids: int) -> None:
        self._own = [psutil.Process(pid) for pid in (os.getpid(), *pids)]
        self.restart()

    def restart(self) -> None:
        """Restart the measurement."""
        self._wall = time.perf_counter()
        self._before = self._foreign_seconds()

    def foreign_share(self) -> float:
        """The core-seconds of other processes over all core-seconds since the start, 0 to 1."""
        seconds = time.perf_counter() - self._wall
        foreign = self._foreign_seconds() - self._before
        return min(max(foreign / (seconds * (os.cpu_count() or 1)), 0.0), 1.0)

    def _foreign_seconds(self) -> float:
        total = psutil.cpu_times()
        busy = sum(total) - total.idle - getattr(total, "iowait", 0.0)
        # Linux includes the time of virtual machine guests in user time.
        busy -= getattr(total, "guest", 0.0) + getattr(total, "guest_nice", 0.0)
        own = [process.cpu_times() for process in self._own]
        return busy - sum(times.user + times.system for times in own)


def require_idle(console: Console, is_forced: bool) -> float:
    """Watch the machine; returns the share of it that other processes use, 0 to 1.

    Raises:
        SystemExit: The share is too large for a measurement, and --force was not passed.
    """
    meter = CpuMeter()
    time.sleep(_WATCHED_SECONDS)
    load = meter.foreign_share()
    if load > BUSY_SHARE and not is_forced:
        console.print(f"other processes use {load:.0%} of the cores; wait, or pass --force")
        raise SystemExit(EXIT_BUSY)
    return load
