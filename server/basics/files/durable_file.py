"""File operations that a crash leaves either done or not done."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from turret.server.errors import StorageFailedError, StorageFullError

_log = logging.getLogger(__name__)

# Written beside its target; whatever has this suffix at the start is left over from a crash.
PARTIAL_SUFFIX = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def sync_directory(path: Path) -> None:
    """Makes creations, renames and removals in a directory outlive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Writes a whole file, over the one that was there; readers see the old or the new one.

    Args:
        path: In a directory that is there.
        data: The file's.
        mode: Its permissions.

    Raises:
        OSError: The disk is full or broken; the old file is still there.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def move_directory(source: Path, target: Path) -> None:
    """Renames a directory whose content is synced already; ``target`` must not exist."""
    source.rename(target)
    sync_directory(target.parent)


def remove_file(path: Path) -> None:
    """Removes a file if it is there."""
    path.unlink(missing_ok=True)
    sync_directory(path.parent)


def remove_directory(path: Path) -> None:
    """Removes a directory and what it holds, if it is there. Not atomic: sweep at the start."""
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def reporting_disk_faults() -> Iterator[None]:
    """Tells clients what the disk told the server, without its paths.

    Raises:
        StorageFullError: A call in the block found no room.
        StorageFailedError: One failed otherwise.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError("the server's disk is full") from error
        _log.exception("the disk failed")
        why = os.strerror(error.errno) if error.errno else "unknown"
        raise StorageFailedError(f"the server cannot use its disk: {why}") from error
