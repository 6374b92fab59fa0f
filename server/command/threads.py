"""The number of computing threads and how they wait, set before the libraries are loaded."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def available_cpus(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP) -> int:
    """The number of processors that this process may use, from its affinity and its cgroup's quota.

    Without the quota, a container with two of a machine's 64 processors would start 64 threads,
    which would take turns on two processors.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, math.ceil(min(affinity or 1, _quota(cgroups, own))))


def use_threads(threads: int | None, *, is_background: bool = False, niceness: int = 0) -> None:
    """Set the number of threads of this process. This has no effect once torch is loaded.

    Args:
        threads: The configured number; None means ``OMP_NUM_THREADS``, or else ``available_cpus``.
        is_background: Whether waiting threads sleep at once instead of spinning, because a server
            on the same machine needs the processors.
        niceness: The number to add to the process's niceness.
    """
    if "torch" in sys.modules:
        return
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(available_cpus()))
    if is_background:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if niceness:
        os.nice(niceness)


def _quota(cgroups: Path, own: Path) -> float:
    """The smallest CPU quota of the cgroup and those above it, in processors; inf without one."""
    try:
        lines = own.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return math.inf
    paths = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    least = math.inf
    for _, controllers, path in paths:
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = cgroups / controllers if controllers else cgroups
        # In a container, the path is that of the host, but the mount shows the container's own
        # group.
        parts = Path(path.lstrip("/")).parts
        places = [folder.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
        least = min([least, *(_share(place) for place in places)])
    return least


def _share(folder: Path) -> float:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        except OSError:
            return math.inf
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return math.inf
    return share if share > 0 else math.inf
