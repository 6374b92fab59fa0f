"""The ``turret`` command in a separate process, and the modules that it loads."""

from __future__ import annotations

import os
import subprocess
import sys

from checkout import ROOT


def loaded_by(*arguments: str) -> tuple[int, set[str]]:
    """The exit code of a command, and its imported modules."""
    return loaded_and_said_by(*arguments)[:2]


def loaded_and_said_by(*arguments: str) -> tuple[int, set[str], str]:
    """The exit code of a command, its imported modules, and its standard error."""
    code = (
        "import sys\nfrom turret.server.cli import main\n"
        "try: code = main(sys.argv[1:])\nexcept SystemExit as end: code = end.code\n"
        "print('\\nloaded', code or 0, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    words = done.stdout.splitlines()[-1].split()
    return int(words[1]), set(words[2:]), done.stderr
