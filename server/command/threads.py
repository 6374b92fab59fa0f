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
        path = own.read_text(encoding="ascii").rpartition("0::/")[2].strip()
    except (OSError, ValueError):
        return math.inf
    # In a container the path is the host's, but the mount shows the container's own group.
    return min(_share(cgroups / path), *map(_share, (cgroups / path).parents))


def _share(folder: Path) -> float:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf
