"""How many threads compute a kernel called from this thread, and which team they belong to."""

from __future__ import annotations

import threading

import torch

from turret.kernels.cpu.native import functions

_local = threading.local()


def use_own_threads() -> None:
    """Have this thread's kernels computed by the library's own threads from now on (team.c).

    As many as torch has on this thread. What torch computes is to stay on this thread then: of two
    teams, each takes the processors that the other one waits for.
    """
    _local.count = torch.get_num_threads()
    functions().turret_own_threads(1)


def num_threads() -> int:
    """Number of threads for a kernel that this thread calls, including itself."""
    return getattr(_local, "count", 0) or torch.get_num_threads()
