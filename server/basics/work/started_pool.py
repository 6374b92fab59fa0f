"""Threads that are there before there is work for them."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor


def started_pool() -> ThreadPoolExecutor:
    """A pool of as many threads as asyncio's own, all of them started.

    A pool that grows refuses work when the system grants no further thread, and yet does that work
    later: whoever was refused would find it done.
    """
    count = min(32, (os.cpu_count() or 1) + 4)
    pool = ThreadPoolExecutor(count, thread_name_prefix="worker")
    # Each thread waits for the others, so that none takes the work of two.
    started = threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    return pool
