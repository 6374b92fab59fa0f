"""Files that somebody names in a flag, and that may turn out to be something else."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_regular(path: Path) -> bytes:
    """The contents of a file. A FIFO or a device is refused: its reader could wait for ever.

    Raises:
        OSError: The file cannot be read, or is not a regular one.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        return file.read()
