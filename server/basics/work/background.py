"""Keeps a thread's torch work on that thread, for the engine's sake.

libgomp gives every thread that runs a parallel region a team of workers of its own. Once the teams
of all threads together outnumber the cores, it stops spinning at barriers and sleeps instead, in
all of them: measured on two cores, a decode step of 16 sequences took 43 ms instead of 25 as soon
as one other thread had multiplied a matrix. So threads that read and lower adapters must not open
parallel regions.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path

import torch

# Linux gives it a tenth of the share of a thread at 0. Where no core is free, engine steps give up
# no more than that, and the work still comes to an end; at 19 it would get a seventieth.
_BACKGROUND_NICENESS = 10
_done = threading.local()


def compute_on_this_thread() -> None:
    """Make the calling thread compute alone from now on. Other threads are not affected.

    Does nothing where torch was built with another OpenMP runtime or another BLAS than it was
    measured with.
    """
    if getattr(_done, "value", False):
        return
    _done.value = True
    # torch sets a thread's team size when it is first asked for; later, that would undo this.
    torch.get_num_threads()
    folder = Path(torch.__file__).parent / "lib"
    for pattern, function in (
        ("libgomp*.so*", "omp_set_num_threads"),
        ("libtorch_cpu.so", "MKL_Set_Num_Threads_Local"),
    ):
        for path in folder.glob(pattern):
            # Already loaded: this finds the library, it does not load another.
            set_threads = getattr(ctypes.CDLL(str(path)), function, None)
            if set_threads is not None:
                set_threads(1)


def work_in_background() -> None:
    """As above, and leave the processor to other threads first, for as long as this one lives.

    Linux alone has a priority for each thread; elsewhere the work competes like any other.
    """
    compute_on_this_thread()
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICENESS)
