"""Where quantised weights are kept."""

from __future__ import annotations

import os
from pathlib import Path

from turret.server.basics.files import unwritable
from turret.server.errors import InvalidRequestError
from turret.server.words import say


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/turret``, else ``~/.cache/turret``.

    Raises:
        InvalidRequestError: The user has no home directory, and the variable is not set.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):
        # This happens in a container whose user id has no entry in the password file.
        raise InvalidRequestError.of("model", say("NO_HOME_DIRECTORY"))
    return Path(root) / "turret"


def check_cache_dir() -> None:
    """Refuse a cache directory that has no weights and is not writable.

    Raises:
        InvalidRequestError: Says which, and how to name another.
    """
    folder = default_cache_dir()
    problem = unwritable(folder)
    if problem and not any(folder.glob("nf4-*")):
        said = say("CACHE_NOT_WRITABLE", folder=folder, problem=problem)
        raise InvalidRequestError.of("model", said)
