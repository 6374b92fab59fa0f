"""A control group with little memory for all of its processes, as in a container."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")


def _own() -> tuple[Path, str]:
    """The group of this process, and the name of the file with its limit."""
    path = ""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
    # Version 2 has one group, in the last line.
    return _ROOT / path.lstrip("/"), "memory.max"


@contextmanager
def memory_group(name: str, limit: int) -> Iterator[Path]:
    """A group below this process's own; skips the test if it cannot be created."""
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
                # The kernel has not released the last process yet.
                assert time.monotonic() < end
                time.sleep(0.05)
