"""Whether a directory can be written, told before it is needed."""

from __future__ import annotations

import os
from pathlib import Path


def unwritable(path: Path) -> str:
    """What keeps a directory from being written, or made, by this user; empty if nothing does."""
    if path.exists():
        if not path.is_dir():
            return "is a file"
        return "" if os.access(path, os.W_OK | os.X_OK) else "cannot be written by this user"
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir():
        return f"cannot be made: {there} is a file"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"cannot be made in {there} by this user"
