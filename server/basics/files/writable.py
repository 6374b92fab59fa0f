"""Whether a directory can be written, told before it is needed."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

# A disk that is full has room again once something was removed; what there is can be served.
_FULL = (errno.ENOSPC, errno.EDQUOT)


def unwritable(path: Path) -> str:
    """What keeps a directory from being written, or made, by this user; empty if nothing does."""
    if path.exists():
        if not path.is_dir():
            return "is a file"
        if not os.access(path, os.W_OK | os.X_OK):
            return "cannot be written by this user"
        why = _refused(path)
        return f"cannot be written: {why}" if why else ""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir():
        return f"cannot be made: {there} is a file"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"cannot be made in {there} by this user"
    why = _refused(there)
    return f"cannot be made: {there} takes no directory ({why})" if why else ""


def _refused(folder: Path) -> str:
    """What a file system that has no permissions to ask about, such as /proc, says when tried."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".turret-", dir=folder))
    except OSError as error:
        return "" if error.errno in _FULL else error.strerror or str(error)
    return ""
