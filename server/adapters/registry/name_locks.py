"""Lets only one thread at a time change a name; other names can change meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class NameLocks:
    """One lock per name. Not re-entrant. The registry's lock may be taken inside, never outside."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken: set[str] = set()

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Holds the lock of a name; waits if another thread holds it."""
        with self._changed:
            self._changed.wait_for(lambda: name not in self._taken)
            self._taken.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._taken.discard(name)
                self._changed.notify_all()
