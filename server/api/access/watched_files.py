"""What was read from files, and is read again when they have changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from turret.server import log
from turret.server.basics.files.regular_file import read_regular

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Stamp = tuple[tuple[int, int, int], ...]


class WatchedFiles(Generic[_T]):
    """Not thread-safe.

    Args:
        paths: The files.
        read: Reads them; raises OSError or ValueError if they are no good.
        what: What they hold, for the log.

    Attributes:
        newest: What was read last; files that are no good change nothing.

    Raises:
        OSError: What ``read`` raised.
        ValueError: What ``read`` raised.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], _T], what: str) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._what = what
        # Before they are read: what changes meanwhile shows at the next look.
        self._seen = self._stamp()
        self.newest = read()

    def look(self) -> bool:
        """Read the files again if they have changed; returns whether ``newest`` is another one."""
        stamp = self._stamp()
        if stamp is None or stamp == self._seen:
            return False
        self._seen = stamp
        try:
            for path in self._paths:
                # Not every reader refuses a FIFO, and here waiting for one would stop the reload.
                read_regular(path)
            self.newest = self._read()
        except (OSError, ValueError) as error:
            _log.error(f"{self._what} stay as they were", extra=log.fields(reason=error))
            return False
        _log.info(f"{self._what} read again")
        return True

    def forget(self) -> None:
        """Have the next look read the files, changed or not."""
        self._seen = None

    def _stamp(self) -> _Stamp | None:
        """What changes when a file is written or replaced; None while one is missing."""
        try:
            stats = [path.stat() for path in self._paths]
        except OSError:
            return None
        return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)
