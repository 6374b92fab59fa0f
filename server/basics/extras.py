"""The command that installs an optional extra of the package."""

from __future__ import annotations

import shlex
import sys


def how_to_add(extra: str) -> str:
    """The command: of this Python, since another one's pip has no turret and would look for one."""
    return f"`{shlex.quote(sys.executable)} -m pip install 'turret[{extra}]'` adds it"
