"""Whether calls are served now, and by what."""

from __future__ import annotations

from collections.abc import Callable

from turret.server.api.backend import Backend
from turret.server.errors import ServerStartingError, UnavailableError


class Gate:
    """Closed while the model loads and from shutdown on; open in between.

    Args:
        check: Called before every call; raises UnavailableError while none may be answered.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self._backend: Backend | None = None
        self._closed_by: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls are served now."""
        return self._backend is not None

    def open(self, backend: Backend) -> None:
        """Serve from now on."""
        self._backend = backend

    def close(self, reason: str) -> None:
        """Refuse every further call with UNAVAILABLE and this text."""
        self._backend = None
        self._closed_by = reason

    def enter(self) -> Backend:
        """The backend.

        Raises:
            ServerStartingError: The model is not loaded yet.
            UnavailableError: The server is draining or dead, or may answer nothing now.
        """
        if self._backend is None:
            if self._closed_by is None:
                raise ServerStartingError("the server is starting: the model is not loaded yet")
            raise UnavailableError(self._closed_by)
        self._check()
        return self._backend
