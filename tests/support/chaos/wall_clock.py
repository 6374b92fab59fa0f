"""The wall clock of other processes, which a test can set: see ``wall_clock.c``.

libfaketime does not serve for this. Told to leave the monotonic clock alone, it breaks the timed
waits on that clock, by which Python's threads hand over the interpreter: a thread that waits asks
for it all the time, and a server under it takes minutes to load its model.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_suffix(".c")


class WallClock:
    """Skips the test where there is no C compiler.

    Args:
        folder: For the library, and the file that says how late it is.

    Attributes:
        environment: Variables of the processes that see this clock.
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
        """Make it that much later, or earlier, than it is."""
        with self._file.open("r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))
