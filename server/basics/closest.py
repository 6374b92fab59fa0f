"""Suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from turret.closest import closest, did_you_mean

__all__ = ["closest", "closest_path", "did_you_mean"]

# Maximum number of directory entries to compare.
_MOST_NAMES = 4096


def closest_path(path: Path, is_meant: Callable[[Path], bool]) -> str | None:
    """The closest entry of a missing path's directory, among those that ``is_meant`` accepts."""
    try:
        beside = list(islice(path.absolute().parent.iterdir(), _MOST_NAMES))
        close = closest(path.name, [each.name for each in beside if is_meant(each)])
    except OSError:
        return None
    return None if close is None else str(path.with_name(close))
