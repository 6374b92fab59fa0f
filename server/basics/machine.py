"""The GPU and the threads of this process, chosen before libraries are loaded.

Triton compiles C code at its first use: its driver and, in version 3.6, a launcher for each form of
a kernel. For this it needs a C compiler and Python's headers. It writes the results to a folder in
the home directory, to which services and containers often cannot write.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import sysconfig
from collections.abc import MutableMapping
from pathlib import Path

from turret.server.errors import InvalidRequestError
from turret.server.words import say

# Triton supports no older NVIDIA devices. AMD devices have higher numbers.
LEAST_CAPABILITY = (8, 0)
_COMPILERS = ("gcc", "clang")


def see_only(device: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Make ``cuda:N`` the only CUDA device that this process sees; other values change nothing.

    Every thread and every library starts with device 0 as its current one, so the serving device
    must be device 0. Call this function before anything asks for devices, as bitsandbytes does when
    it is imported, because CUDA reads ``CUDA_VISIBLE_DEVICES`` only once.

    Raises:
        InvalidRequestError: ``CUDA_VISIBLE_DEVICES`` lists too few devices.
    """
    if not device.startswith("cuda:"):
        return
    number, visible = int(device.removeprefix("cuda:")), environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number)] * (number + 1)
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
    if number >= len(names):
        why = say("DEVICE_NOT_VISIBLE", device=device, visible=visible)
        raise InvalidRequestError.of("device", why)
    environ["CUDA_VISIBLE_DEVICES"] = names[number]


def missing_for_triton() -> str:
    """The missing packages that Triton needs, in words; empty if there are none."""
    missing = []
    if "CC" not in os.environ and not any(map(shutil.which, _COMPILERS)):
        missing.append("a C compiler (gcc or clang, or another one that CC names)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("Python's C headers (python3-dev, or what your system calls it)")
    return " and ".join(missing)


def keep_compiled_in(folder: Path, environ: MutableMapping[str, str] = os.environ) -> None:
    """Make Triton keep its compiled code in a folder, unless the environment names one."""
    environ.setdefault("TRITON_CACHE_DIR", str(folder))


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
