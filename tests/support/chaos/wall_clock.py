"""The wall clock of other processes, which a test can set: see ``wall_clock.c``.

libfaketime cannot be used for this. If it leaves the monotonic clock alone, it breaks timed waits
on that clock, which Python's threads use to hand over the interpreter. Waiting threads then spin,
and a server takes minutes to load its model.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_suffix(".c")


class WallClock:
    """A wall clock that can be set. Skips the test without a C compiler.

    Args:
        folder: The directory for the library and the file with the offset.

    Attributes:
        environment: The variables of processes that see this clock.
    """

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("there is no C compiler")
        library, self._file = folder / "wall_clock.so", folder / "wall_clock"
        command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(_SOURCE)]
        subprocess.run(command, check=True)
        self._file.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "WALL_CLOCK_FILE": str(self._file)}

    def set_ahead(self, seconds: int) -> None:
        """Move the clock ahead by some seconds, or back for a negative number."""
        with self._file.open("r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))
