"""The directory that the registry survives a restart in.

    LOCK                       held by the one server that uses the directory
    base.json                  the base model that the adapters belong to
    adapters/<name>.json       a registration each
    files/<uuid>.<generation>/ the files of an uploaded generation
    incoming/<random>/         an upload under way; emptied at the start

A registration's file is the truth: what ``files/`` holds beyond it is left over from a crash or
from a generation that was in use then, and is swept at the start. An operation writes files first
and the registration last, so a crash leaves the state before it or the state after it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turret.server import log
from turret.server.adapters.source import Source
from turret.server.adapters.state.saved_registration import SavedRegistration
from turret.server.adapters.state.staged_upload import StagedUpload, UploadedFile
from turret.server.basics.byte_size import about_bytes
from turret.server.basics.files import (
    PARTIAL_SUFFIX,
    remove_directory,
    remove_file,
    replace_file,
    reporting_disk_faults,
)
from turret.server.errors import BudgetExceededError, StorageFullError
from turret.server.words import say

if TYPE_CHECKING:
    # Only for type checkers: importing it would load torch.
    from turret.server.adapters.adapter import Adapter

_log = logging.getLogger(__name__)

# An upload must leave this much disk space, so that registrations can still be written.
MIN_FREE_BYTES = 16 << 20


class StateDir:
    """Thread-safe for different names; one change of a name at a time.

    Args:
        path: Made if it does not exist.
        max_upload_bytes: Most bytes of one upload.

    Raises:
        OSError: It cannot be used.
        ValueError: Another server uses it.
    """

    def __init__(self, path: Path, max_upload_bytes: int) -> None:
        self.path = path.resolve()
        self._max_upload_bytes = max_upload_bytes
        self._adapters = self.path / "adapters"
        self._files = self.path / "files"
        self._incoming = self.path / "incoming"
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _lock(self.path / "LOCK")
        for directory in (self._adapters, self._files, self._incoming):
            directory.mkdir(exist_ok=True, mode=0o700)

    def close(self) -> None:
        """Lets another server use the directory; nothing may be written any more."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def bind(self, base_name: str, base_digest: str) -> None:
        """Ties the directory to a base model, the first time; later checks that it is the same.

        Raises:
            ValueError: It belongs to another base model.
        """
        path = self.path / "base.json"
        if not path.exists():
            base = {"version": 1, "name": base_name, "digest": base_digest}
            replace_file(path, json.dumps(base, indent=1).encode())
            return
        base: dict[str, Any] = json.loads(path.read_bytes())
        if base.get("digest") != base_digest:
            text = say(
                "STATE_OF_OTHER_BASE", path=self.path, found=base.get("name"), base_model=base_name
            )
            raise ValueError(text)

    def read(self, *, sweeps: bool = True) -> list[SavedRegistration]:
        """Every registration, by name, after removing what a crash left half done.

        A file that cannot be read is reported and left alone, and so are then all uploaded files.

        Args:
            sweeps: Remove uploads that nothing is registered for; others may be at work on them
                where a fleet shares the directory.
        """
        found: list[SavedRegistration] = []
        is_complete = True
        for path in sorted(self._adapters.iterdir()):
            if path.name.endswith(PARTIAL_SUFFIX):
                path.unlink()
                continue
            try:
                saved = SavedRegistration.from_json(path.read_bytes())
                if path.name != f"{saved.name}.json":
                    raise ValueError(f"is the registration of {saved.name!r}")
            except (OSError, ValueError) as error:
                _log.error("cannot restore", extra=log.fields(file=path, reason=error))
                is_complete = False
                continue
            found.append(saved)
        if not sweeps:
            return found
        for path in self._incoming.iterdir():
            remove_directory(path)
        if is_complete:
            kept = {saved.source.path for saved in found if saved.source.is_upload}
            for path in self._files.iterdir():
                if str(path.relative_to(self.path)) not in kept:
                    remove_directory(path)
        return found

    def save(self, adapter: Adapter, *, pinned: bool, source: Source | None = None) -> None:
        """Saves a generation as the one that its name has after a restart.

        Args:
            adapter: The generation.
            pinned: Whether it is to be pinned then.
            source: Where its files will be; None for where they are.

        Raises:
            StorageFullError: The disk is full; what was saved before still holds.
        """
        saved = SavedRegistration(
            name=adapter.name,
            uuid=adapter.uuid,
            generation=adapter.generation,
            pinned=pinned,
            source=source or adapter.source,
            facts=adapter.facts,
        )
        self.write(saved)

    def write(self, saved: SavedRegistration) -> None:
        """Saves a registration, to be restored after a restart.

        Raises:
            StorageFullError: The disk is full; what was saved before still holds.
        """
        with reporting_disk_faults():
            replace_file(self._adapters / f"{saved.name}.json", saved.to_json())

    def remove(self, name: str) -> None:
        """Forgets a registration; its files are the caller's to discard."""
        with reporting_disk_faults():
            remove_file(self._adapters / f"{name}.json")

    def stage(self, files: Sequence[UploadedFile]) -> StagedUpload:
        """Makes room for an upload.

        Raises:
            BudgetExceededError: Larger than the server takes.
            StorageFullError: The disk has no room for it.
        """
        self.check_room(sum(file.size_bytes for file in files))
        return stage_below(self._incoming, files)

    def check_room(self, num_bytes: int) -> None:
        """Raises what ``stage`` raises for files of this size."""
        check_room_in(self.path, num_bytes, self._max_upload_bytes)

    def staged_source(self, staged: StagedUpload, name: str) -> Source:
        """The source of a staged upload for adapter ``name`` until it is adopted."""
        return source_of(staged, self.path, name)

    def adopt(self, staged: StagedUpload, adapter: Adapter) -> None:
        """Moves a finished upload to its place and points the adapter there."""
        target = self._files / adapter.key
        with reporting_disk_faults():
            staged.move(target)
        path = str(target.relative_to(self.path))
        adapter.source = dataclasses.replace(adapter.source, path=path)

    def discard(self, source: Source) -> None:
        """Removes a generation's files if they were uploaded; others belong to the operator."""
        if source.is_upload:
            remove_directory(self.path / source.path)


def stage_below(incoming: Path, files: Sequence[UploadedFile]) -> StagedUpload:
    """An empty upload in a directory of its own."""
    with reporting_disk_faults():
        return StagedUpload(Path(tempfile.mkdtemp(dir=incoming)), files)


def source_of(staged: StagedUpload, state_dir: Path, name: str) -> Source:
    """The source of a staged upload for adapter ``name`` until it is adopted."""
    return Source(str(staged.directory.relative_to(state_dir)), is_upload=True, adapter=name)


def check_room_in(path: Path, num_bytes: int, most: int) -> None:
    """Raises what ``StateDir.stage`` raises for files of this size."""
    if num_bytes > most:
        raise BudgetExceededError(say("UPLOAD_TOO_LARGE", bytes=num_bytes, max_upload_bytes=most))
    with reporting_disk_faults():
        free = shutil.disk_usage(path).free
    if num_bytes + MIN_FREE_BYTES > free:
        shown = {"free": about_bytes(free), "needed": about_bytes(num_bytes + MIN_FREE_BYTES)}
        raise StorageFullError(say("STATE_DISK_FULL", bytes=num_bytes, **shown))


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # The kernel releases the lock when the process ends, however that happens.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(say("STATE_DIR_IN_USE", path=path.parent)) from None
    return descriptor
