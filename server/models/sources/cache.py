"""Where quantised weights are kept."""

from __future__ import annotations

import os
from pathlib import Path

from turret.server.basics.files import unwritable
from turret.server.errors import InvalidRequestError

# Advice if the cache directory is not writable.
NAMES = "XDG_CACHE_HOME names another place for them"


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/turret``, else ``~/.cache/turret``.

    Raises:
        InvalidRequestError: The user has no home directory, and the variable is not set.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):
        # This happens in a container whose user id has no entry in the password file.
        raise InvalidRequestError.of(
            "model", f"there is no home directory for its quantised weights; {NAMES}"
        )
    return Path(root) / "turret"


def check_cache_dir() -> None:
    """Refuse a cache directory that has no weights and is not writable.

    Raises:
        InvalidRequestError: Says which, and how to name another.
    """
    folder = default_cache_dir()
    problem = unwritable(folder)
    if problem and not any(folder.glob("nf4-*")):
        raise InvalidRequestError.of(
            "model", f"its quantised weights have no place: {folder} {problem}; {NAMES}"
        )
