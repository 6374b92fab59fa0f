"""Stops long work on another thread where it can stop cleanly."""

from __future__ import annotations

from turret.server.errors import TurretError


class Interrupt:
    """Set from any thread, looked at by the one that works."""

    def __init__(self) -> None:
        self._error: TurretError | None = None

    def set(self, error: TurretError) -> None:
        """Asks the work to end with this error; the first one counts."""
        self._error = self._error or error

    def check(self) -> None:
        """Raises the error that was set, if any."""
        if self._error is not None:
            raise self._error
