"""Keeps a thread's torch work on that thread, so that it does not slow down the engine.

libgomp gives every thread that runs a parallel region its own team of workers. Once the workers of
all teams outnumber the cores, libgomp stops spinning at barriers, in all teams, and sleeps instead:
on two cores, a decode step of 16 sequences took 43 ms instead of 25 ms as soon as one other thread
had multiplied a matrix. So threads that read and lower adapters must not open parallel regions.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from turret.lazy_torch import torch
from turret.server.errors import OutOfMemoryError, TurretError
from turret.server.words import say

# Linux gives this niceness a tenth of the share of a thread at 0. If no core is free, engine steps
# lose no more than that, and the work still finishes; 19 would get a seventieth.
_BACKGROUND_NICENESS = 10
_done = threading.local()


def compute_on_this_thread() -> None:
    """Make the calling thread compute alone from now on. Other threads are not affected.

    This covers libgomp and MKL. Any other OpenMP runtime or BLAS keeps its number of threads.
    """
    if getattr(_done, "value", False):
        return
    _done.value = True
    # Ask for the team size now: torch sets it at the first request, which would later undo this.
    torch.get_num_threads()
    folder = Path(torch.__file__).parent / "lib"
    for pattern, function in (
        ("libgomp*.so*", "omp_set_num_threads"),
        ("libtorch_cpu.so", "MKL_Set_Num_Threads_Local"),
    ):
        for path in folder.glob(pattern):
            # The library is already loaded, so this only looks it up.
            set_threads = getattr(ctypes.CDLL(str(path)), function, None)
            if set_threads is not None:
                set_threads(1)


def work_in_background() -> None:
    """Compute on this thread alone, with a low priority, for as long as the thread lives.

    Only Linux has priorities per thread. On other systems, the priority stays the same.
    """
    compute_on_this_thread()
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICENESS)


def started_pool() -> ThreadPoolExecutor:
    """A pool of as many threads as asyncio's own, all of them started.

    If the system allows no further thread, a growing pool raises an error for the work, but may
    still run it later. If all threads are started, this cannot happen.
    """
    count = min(32, (os.cpu_count() or 1) + 4)
    pool = ThreadPoolExecutor(count, thread_name_prefix="worker")
    # Each task waits for all others, so no thread can take two.
    started = threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    return pool


# Reports the progress of long work: a description, the number of finished parts, and the total.
OnProgress = Callable[[str, int, int], None]


# Free memory that glibc keeps.


def return_free_memory() -> None:
    """Return free memory of the process to the system. Does nothing without glibc.

    Each thread that allocates has an arena. glibc returns only the free memory at the end of an
    arena, so a few small blocks at the end can retain hundreds of megabytes. The call takes about
    30 ms per 100 MB that it returns, during which other Python threads run.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


# Cancellation of long work on another thread, at a point where it can end cleanly.


class Cancellation:
    """A request to end work: any thread may set it, and the working thread checks it."""

    def __init__(self) -> None:
        self._cause: Future[TurretError] = Future()

    @property
    def is_set(self) -> bool:
        return self._cause.done()

    def set(self, error: TurretError) -> None:
        """Ask the work to end with this error. Only the first error counts."""
        with contextlib.suppress(InvalidStateError):
            self._cause.set_result(error)

    def check(self) -> None:
        """Raise the error that was set, if any."""
        if self._cause.done():
            raise self._cause.result()

    def wait(self, future: Future[Any]) -> bool:
        """Block until ``future`` is done or this is set; returns whether ``future`` is done."""
        wait({future, self._cause}, return_when=FIRST_COMPLETED)
        return future.done()


# Detection of errors caused by a lack of memory.

# Torch's allocator raises a specific type. Other sources mention memory only in the message: the
# driver (loading a kernel or instantiating a graph), libraries that create a handle, Triton, torch
# on a CPU, and Python when it starts a thread.
_WORDS = ("out of memory", "alloc_failed", "can't allocate memory", "can't start new thread")
# fork() fails with EAGAIN if the number of processes is limited.
_NUMBERS = (errno.ENOMEM, errno.EAGAIN)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error was caused by a lack of memory, so that a retry may succeed."""
    if isinstance(error, OSError):
        return error.errno in _NUMBERS
    # If torch is not loaded, it cannot have raised the error.
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)


def turret_error(error: BaseException, otherwise: str | None = None) -> TurretError:
    """The error for a caller: out of memory, ``otherwise``, or an internal error."""
    if isinstance(error, TurretError):
        return error
    if is_out_of_memory(error):
        return OutOfMemoryError(say("OUT_OF_MEMORY"))
    return TurretError(otherwise or say("INTERNAL"))


class _Raises(contextlib.ContextDecorator):
    """A reusable context manager and decorator that replaces some errors by others.

    Args:
        other: Returns the replacement for an error; None to keep the error.
    """

    def __init__(self, other: Callable[[BaseException], BaseException | None]) -> None:
        self._other = other

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and (other := self._other(error)) is not None:
            raise other from error


def _lack_of_memory(error: BaseException) -> TurretError | None:
    # Libraries may raise other errors while they handle a MemoryError.
    cause: BaseException | None = error
    while cause is not None and not is_out_of_memory(cause):
        cause = cause.__cause__ or cause.__context__
    return None if cause is None else turret_error(cause, "")


def _panic(error: BaseException) -> RuntimeError | None:
    # Each library has its own PanicException and does not export it.
    return RuntimeError(f"panic: {error}") if type(error).__name__ == "PanicException" else None


# Context manager for code that reads untrusted files: an error caused by a lack of memory becomes
# an OutOfMemoryError, because the files are not to blame.
LACK_OF_MEMORY_IS_REPORTED = _Raises(_lack_of_memory)
# Context manager and decorator for libraries in Rust: a panic, which ``except Exception`` does not
# catch and which would end the thread, becomes a RuntimeError.
PANICS_ARE_ERRORS = _Raises(_panic)
