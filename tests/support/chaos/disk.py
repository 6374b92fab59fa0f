"""A small separate disk, which can be filled and made read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _run(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Path]:
    """Mount a file system in memory at ``path``; skips the test if that is not allowed."""
    path.mkdir()
    if not _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)):
        pytest.skip("this user may not mount file systems")
    try:
        yield path
    finally:
        _run("umount", "-l", str(path))


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Make everything below ``path`` read-only within the block."""
    assert _run("mount", "--bind", str(path), str(path))
    try:
        assert _run("mount", "-o", "remount,bind,ro", str(path))
        yield
    finally:
        _run("umount", "-l", str(path))


@contextmanager
def filled(path: Path) -> Iterator[None]:
    """Fill the disk below ``path`` completely within the block."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 65536):
                pass
        except OSError:
            pass
    try:
        yield
    finally:
        filler.unlink()
