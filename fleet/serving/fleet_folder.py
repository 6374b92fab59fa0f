"""The folders of fleets that were started on this machine, and their removal when a fleet has died.

The command that starts a fleet holds a lock in its folder. The kernel releases the lock even if the
command is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_PREFIX = "turret-"
# A file that the command locks. It holds the path of the fleet's state directory.
_OWNER = "OWNER"
_MOST_BYTES = 1 << 16
_KILL_SECONDS = 5.0
_POLL_SECONDS = 0.02
# Used if the path of the temporary directory is too long. Ray appends its node id and a socket name
# to the folder's path; HAProxy allows 97 bytes in all.
_SHORT = Path("/tmp")
_MOST_PATH_BYTES = 97 - len("/admin.sock") - len("/") - 56
_RANDOM_CHARS = 8  # The length of the suffix that mkdtemp adds.


@dataclass(frozen=True, slots=True)
class FleetFolder:
    """The folder of a fleet that this process starts. Other users cannot enter it.

    Attributes:
        path: The absolute path.
        lock: The descriptor that holds the lock.
    """

    path: Path
    lock: int

    @classmethod
    def make(cls, state_dir: Path) -> Self:
        """Makes a folder and locks it.

        Args:
            state_dir: The fleet's state directory, absolute; ``state_dirs`` returns it.

        Raises:
            OSError: The folder cannot be made.
        """
        place = Path(tempfile.gettempdir())
        longest = place / f"{_PREFIX}{'x' * _RANDOM_CHARS}"
        if len(os.fsencode(longest)) > _MOST_PATH_BYTES:
            place = _SHORT
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        unlocked = path / f"{_OWNER}.new"
        lock = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.write(lock, os.fsencode(state_dir))
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Publish the file only now, so that nobody finds it unlocked.
        unlocked.rename(path / _OWNER)
        return cls(path, lock)

    def remove(self) -> None:
        """Removes the folder, and ends the ingress if it still runs."""
        _remove(self.path)
        os.close(self.lock)


def state_dirs() -> list[Path]:
    """The state directories of this user's fleets that were started here and still run."""
    found = []
    for _, lock in _owned():
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            found.append(Path(os.fsdecode(os.pread(lock, _MOST_BYTES, 0))))
    return sorted(found)


def remove_dead() -> list[Path]:
    """Ends the ingress of each fleet of this user whose command was killed, and removes its folder.

    Returns:
        The folders.
    """
    removed = []
    for path, lock in _owned():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        _remove(path)
        removed.append(path)
    return removed


def _owned() -> Iterator[tuple[Path, int]]:
    """Folders of this user's fleets, each with a descriptor of the file that its command locks."""
    places = {Path(tempfile.gettempdir()), _SHORT}
    for path in sorted(path for place in places for path in place.glob(f"{_PREFIX}*")):
        try:
            is_own = stat.S_ISDIR(path.lstat().st_mode) and path.lstat().st_uid == os.getuid()
            lock = os.open(path / _OWNER, os.O_RDONLY | os.O_CLOEXEC) if is_own else -1
        except OSError:
            # The folder has just been removed, or a joined cluster uses it without an owner.
            continue
        if lock < 0:
            continue
        try:
            yield path, lock
        finally:
            os.close(lock)


def _remove(path: Path) -> None:
    # Ray's ingress manager normally shuts the ingress down. Kill what is left, in case the manager
    # itself was killed.
    end = time.monotonic() + _KILL_SECONDS
    while (left := list(_ingresses(path))) and time.monotonic() < end:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    shutil.rmtree(path, ignore_errors=True)


def _ingresses(folder: Path) -> Iterator[int]:
    """Every HAProxy of this user whose configuration is in the folder; none without /proc."""
    below = os.fsencode(folder) + b"/"
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # The command line of a zombie is empty.
            program, *arguments = (process / "cmdline").read_bytes().split(b"\0")
            is_own = process.stat().st_uid == os.getuid()
        except OSError:
            continue
        is_haproxy = is_own and program.endswith(b"/haproxy")
        if is_haproxy and any(each.startswith(below) for each in arguments):
            yield int(process.name)
