"""Suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from turret.closest import closest, did_you_mean

__all__ = ["closest", "did_you_mean", "path_meant"]

# Maximum number of directory entries to compare.
_MOST_NAMES = 4096


def path_meant(path: Path, is_meant: Callable[[Path], bool]) -> str:
    """A suggestion for a missing path, from entries of its directory that ``is_meant`` accepts."""
    try:
        beside = list(islice(path.absolute().parent.iterdir(), _MOST_NAMES))
        close = closest(path.name, [each.name for each in beside if is_meant(each)])
    except OSError:
        return ""
    return "" if close is None else f"; did you mean {str(path.with_name(close))!r}?"
