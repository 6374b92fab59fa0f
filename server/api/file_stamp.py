"""Tells whether files have changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Stamp = tuple[tuple[int, int, int], ...]


def file_stamp(paths: Sequence[Path]) -> Stamp | None:
    """What changes when a file is written or replaced; None while one is missing."""
    try:
        stats = [path.stat() for path in paths]
    except OSError:
        return None
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)
