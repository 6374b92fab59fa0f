"""Ends long work on another thread where it can end cleanly."""

from __future__ import annotations

import contextlib
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from typing import Any

from turret.server.errors import TurretError


class Cancellation:
    """Set from any thread by whoever no longer wants the work; looked at by the one that works."""

    def __init__(self) -> None:
        self._cause: Future[TurretError] = Future()

    @property
    def is_set(self) -> bool:
        return self._cause.done()

    def set(self, error: TurretError) -> None:
        """Ask the work to end with this error; the first one counts."""
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
