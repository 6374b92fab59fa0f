"""A client whose waits show whether something else delays a server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor


class Neighbour:
    """Repeats calls, each on a thread of its own, while the block runs.

    Args:
        calls: Functions that make one call. If they yield pieces, each piece is timed.

    Attributes:
        worst: The longest wait so far for an answer, or for the next piece of one.
        counts: The number of answers to each call.
    """

    def __init__(self, *calls: Callable[[], Iterable[object]]) -> None:
        self.worst = 0.0
        self.counts = [0] * len(calls)
        self._calls = calls
        self._over = threading.Event()

    def __enter__(self) -> Neighbour:
        pool = ThreadPoolExecutor(len(self._calls))
        self._running = [pool.submit(self._repeat, *each) for each in enumerate(self._calls)]
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for running in self._running:
            running.result(120)

    def _repeat(self, number: int, call: Callable[[], Iterable[object]]) -> None:
        while not self._over.wait(0.02):
            start = time.monotonic()
            for _ in call():
                self.worst = max(self.worst, time.monotonic() - start)
                start = time.monotonic()
            self.counts[number] += 1
