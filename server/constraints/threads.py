"""Threads with room on their stacks: llguidance follows nested rules by recursion.

On an ordinary stack of 8 MiB a grammar of a few thousand nested rules ends the process. Rules nest
no deeper than a constraint has characters, so these stacks hold the deepest that is let in
(measured: 2 KiB a rule, of at least 8 characters). They are address space; only what is used of
them is memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from turret.server.constraints.spec import MAX_CONSTRAINT_CHARS

STACK_BYTES = MAX_CONSTRAINT_CHARS * (4 << 10)

_lock = threading.Lock()


def start_roomy(thread: threading.Thread) -> None:
    """Start a thread with a stack of ``STACK_BYTES``."""
    # The size is the process's: a thread that others start meanwhile has room too.
    with _lock:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)


def roomy_executor(
    num_threads: int, name: str, initializer: Callable[[], None] | None = None
) -> ThreadPoolExecutor:
    """An executor whose threads, all of them started, have stacks of ``STACK_BYTES``."""
    executor = ThreadPoolExecutor(num_threads, name, initializer=initializer)
    together = threading.Barrier(num_threads + 1)
    # The size is the process's: a thread that others start meanwhile has room too.
    with _lock:
        before = threading.stack_size(STACK_BYTES)
        try:
            for _ in range(num_threads):
                executor.submit(together.wait)
        finally:
            threading.stack_size(before)
    together.wait()
    return executor
