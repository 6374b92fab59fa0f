"""What brings an extra of the package to where it runs."""

from __future__ import annotations

import shlex
import sys


def how_to_add(extra: str) -> str:
    """The command: of this Python, since another one's pip has no turret and would look for one."""
    return f"`{shlex.quote(sys.executable)} -m pip install 'turret[{extra}]'` adds it"
