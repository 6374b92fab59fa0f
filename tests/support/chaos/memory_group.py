"""A control group whose processes together have little memory, as in a container."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")


def _own() -> tuple[Path, str]:
    """This process's group, and the name of the file with its limit."""
    path = ""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
    # Version 2 has one group, which is the last line.
    return _ROOT / path.lstrip("/"), "memory.max"


@contextmanager
def memory_group(name: str, limit: int) -> Iterator[Path]:
    """A group below this process's own; skips the test where none can be made."""
    own, file = _own()
    group = own / name
    try:
        group.mkdir()
        (group / file).write_text(str(limit))
    except OSError as error:
        pytest.skip(f"this user cannot limit a group's memory: {error}")
    try:
        yield group
    finally:
        end = time.monotonic() + 30
        while True:
            try:
                group.rmdir()
                break
            except OSError:
                # The kernel has not yet let go of the last process.
                assert time.monotonic() < end
                time.sleep(0.05)
