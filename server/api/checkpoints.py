"""Checkpoints of adapters in training: directories with PEFT's files, under ``tinker://`` paths.

    <run>/<kind>/<name>/adapter_config.json, …   as ``TrainingService.save`` writes them
    <run>/<kind>/<name>/checkpoint.json          what the API reports about the checkpoint
    <run>/<kind>/<name>~/                        a checkpoint that is being replaced
    incoming/<random>/                           an unfinished or removed checkpoint

A checkpoint is written completely and then renamed, so a crash leaves no partial one. If a crash
happens between the two renames of a replacement, the next start undoes the first one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

from pydantic import TypeAdapter, ValidationError

from turret.server import log
from turret.server.basics.files import (
    move_directory,
    read_regular,
    remove_directory,
    replace_file,
    reporting_disk_faults,
)
from turret.server.basics.turns import completed
from turret.server.errors import (
    InvalidRequestError,
    StorageFailedError,
    StorageFullError,
    TrainingNotFoundError,
)
from turret.server.training import LearnerConfig
from turret.server.words import say

_log = logging.getLogger(__name__)

KINDS = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
# How many checkpoints an owner may have, and the longest time to live that a client may set.
MAX_CHECKPOINTS = 256
MAX_TTL_SECONDS = 10 * 365 * 86400
_SCHEME = "tinker://"
_FACTS = "checkpoint.json"
_INCOMING = "incoming"
# Marks the directory of a checkpoint that is being replaced. Names cannot contain this character.
_REPLACED = "~"
_RUN = re.compile(r"[0-9a-f]{32}:train:[0-9]{1,10}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHOWN_CHARS = 200
_STARTED = time.time() - time.monotonic()


def unix_time() -> float:
    """The Unix time. Once the process runs, setting the wall clock does not change it."""
    return _STARTED + time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint.

    Attributes:
        run: The id of the model in training that was saved.
        kind: A key of ``KINDS``.
        name: The name that the client chose.
        owner: The client that saved it.
        base: The digest of the base model.
        config: The config of the adapter.
        time: When the checkpoint was saved, in Unix seconds.
        expires: When the server removes it, in Unix seconds; None for never.
        size: The size of the files in bytes.
        metadata: The client's own notes.
    """

    run: str
    kind: str
    name: str
    owner: str
    base: str
    config: LearnerConfig
    time: float = field(default_factory=unix_time)
    expires: float | None = None
    size: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The path that clients use for this checkpoint."""
        return f"{_SCHEME}{self.run}/{self.kind}/{self.name}"

    @property
    def is_expired(self) -> bool:
        return self.expires is not None and self.expires <= unix_time()


_CHECKPOINT = TypeAdapter(Checkpoint)


def not_found(path: str) -> TrainingNotFoundError:
    """The error for a path that has no checkpoint, or one that the client must not see."""
    return TrainingNotFoundError(say("CHECKPOINT_NOT_FOUND", path=path[:_SHOWN_CHARS]))


def _is_valid(checkpoint: Checkpoint) -> bool:
    is_run = _RUN.fullmatch(checkpoint.run) is not None
    return is_run and checkpoint.kind in KINDS and NAME.fullmatch(checkpoint.name) is not None


class Checkpoints:
    """All checkpoints in a directory. Use an instance on one event loop only.

    Args:
        folder: The directory, which nothing else uses; it is created if it does not exist.

    Raises:
        OSError: The directory cannot be read or created.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_directory(folder / _INCOMING)
        (folder / _INCOMING).mkdir(mode=0o700)
        for replaced in folder.glob(f"*/*/*{_REPLACED}"):
            name = replaced.with_name(replaced.name.removesuffix(_REPLACED))
            if name.exists():
                remove_directory(replaced)
            else:
                move_directory(replaced, name)
        self._all: dict[str, Checkpoint] = {}
        # The locks of paths whose files are being changed.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        for file in sorted(folder.glob(f"*/*/*/{_FACTS}")):
            try:
                found = _CHECKPOINT.validate_json(read_regular(file))
            except (OSError, ValidationError):
                found = None
            is_own = found is not None and _is_valid(found) and self.folder(found) == file.parent
            if found is None or not is_own:
                _log.warning("a checkpoint is unreadable", extra=log.fields(path=file.parent))
            else:
                self._all[found.path] = found

    def owned(self, owner: str) -> list[Checkpoint]:
        """The checkpoints of an owner, the newest first."""
        found = [each for each in self._all.values() if each.owner == owner]
        return sorted((each for each in found if not each.is_expired), key=lambda it: -it.time)

    @property
    def bytes_by_owner(self) -> Counter[str]:
        """The total size of each owner's checkpoints."""
        found: Counter[str] = Counter()
        for each in self._all.values():
            found[each.owner] += each.size
        return found

    @property
    def bytes_free(self) -> int:
        """The free space of the disk.

        Raises:
            StorageFailedError: The disk failed.
        """
        with reporting_disk_faults():
            return shutil.disk_usage(self._folder).free

    def find(self, owner: str | None, path: str) -> Checkpoint:
        """The checkpoint with this path.

        Args:
            owner: The client; None if it has proved that it may see the checkpoint.
            path: The path.

        Raises:
            TrainingNotFoundError: The checkpoint does not exist, or belongs to another client.
        """
        found = self._all.get(path)
        if found is None or owner not in (None, found.owner) or found.is_expired:
            raise not_found(path)
        return found

    def folder(self, checkpoint: Checkpoint) -> Path:
        """The directory of a checkpoint, whose run, kind and name must be valid."""
        assert _is_valid(checkpoint), "a name that could lead out of the directory"
        run = checkpoint.run.replace(":train:", ".")
        return self._folder / run / checkpoint.kind / checkpoint.name

    @contextlib.contextmanager
    def reading(self, checkpoint: Checkpoint) -> Iterator[Path]:
        """The directory of a checkpoint. Another task may remove it while the block runs.

        Raises:
            TrainingNotFoundError: The checkpoint was removed.
        """
        try:
            yield self.folder(checkpoint)
        except FileNotFoundError:
            raise not_found(checkpoint.path) from None

    async def save(
        self,
        checkpoint: Checkpoint,
        write: Callable[[Path], Awaitable[None]],
        *,
        overwrite: bool = False,
    ) -> Checkpoint:
        """Save a checkpoint, completely or not at all; returns it with its size.

        Args:
            checkpoint: The facts about the checkpoint; this method determines the size.
            write: Writes the files into an empty directory.
            overwrite: Whether to replace a checkpoint with the same path.

        Raises:
            InvalidRequestError: The name is invalid or taken, or the owner has too many
                checkpoints.
            StorageFullError, StorageFailedError: The disk failed.
        """
        if NAME.fullmatch(checkpoint.name) is None:
            raise InvalidRequestError.of(
                "path", say("NOT_MATCHING", pattern=NAME.pattern, value=checkpoint.name)
            )
        before = self._all.get(checkpoint.path)
        is_taken = before is not None and not before.is_expired
        if is_taken and not overwrite:
            text = say("CHECKPOINT_EXISTS", path=checkpoint.path)
            raise InvalidRequestError.of("path", text)
        if not is_taken and len(self.owned(checkpoint.owner)) >= MAX_CHECKPOINTS:
            text = say("TRAINING_LIMIT_REACHED", most=MAX_CHECKPOINTS, what="checkpoints")
            raise InvalidRequestError.of("path", text)
        with reporting_disk_faults():
            incoming = Path(tempfile.mkdtemp(dir=self._folder / _INCOMING))
            try:
                await write(incoming)
                async with self._lock(checkpoint):
                    saved = await completed(asyncio.to_thread(self._complete, checkpoint, incoming))
                    self._all[saved.path] = saved
            finally:
                await asyncio.to_thread(remove_directory, incoming)
        return saved

    async def remove(self, checkpoint: Checkpoint) -> None:
        """Remove a checkpoint with its files, unless it was replaced or prolonged meanwhile."""
        async with self._lock(checkpoint):
            found = self._all.get(checkpoint.path)
            if found is None or found.time != checkpoint.time:
                return
            if checkpoint.is_expired and not found.is_expired:
                return
            del self._all[checkpoint.path]
            await completed(self._remove_files(found))

    def _lock(self, checkpoint: Checkpoint) -> asyncio.Lock:
        """The lock with which one task at a time changes the files of a checkpoint."""
        return self._locks.setdefault(checkpoint.path, asyncio.Lock())

    async def _remove_files(self, checkpoint: Checkpoint) -> None:
        with reporting_disk_faults():
            try:
                await asyncio.to_thread(self._discard, self.folder(checkpoint))
            except OSError:
                # The checkpoint still takes space. Its owner or ``sweep`` can try again.
                self._all.setdefault(checkpoint.path, checkpoint)
                raise

    async def expire_at(self, checkpoint: Checkpoint, expires: float | None) -> None:
        """Change the time at which a checkpoint is removed.

        Raises:
            TrainingNotFoundError: The checkpoint was removed or replaced meanwhile.
        """
        async with self._lock(checkpoint):
            found = self._all.get(checkpoint.path)
            if found is None or found.time != checkpoint.time:
                raise not_found(checkpoint.path)
            await completed(self._write_facts(dataclasses.replace(found, expires=expires)))

    async def _write_facts(self, checkpoint: Checkpoint) -> None:
        with reporting_disk_faults():
            file = self.folder(checkpoint) / _FACTS
            await asyncio.to_thread(replace_file, file, _CHECKPOINT.dump_json(checkpoint))
        self._all[checkpoint.path] = checkpoint

    async def sweep(self) -> None:
        """Remove expired checkpoints."""
        for checkpoint in [each for each in self._all.values() if each.is_expired]:
            # A failure delays only its own checkpoint, which the next sweep tries again.
            with contextlib.suppress(StorageFullError, StorageFailedError):
                await self.remove(checkpoint)

    def _complete(self, checkpoint: Checkpoint, incoming: Path) -> Checkpoint:
        """Move a written directory to its place, where it replaces an older checkpoint."""
        size = 0
        for file in incoming.iterdir():
            with file.open("rb") as content:
                os.fsync(content.fileno())
                size += os.fstat(content.fileno()).st_size
        saved = dataclasses.replace(checkpoint, size=size)
        replace_file(incoming / _FACTS, _CHECKPOINT.dump_json(saved))
        folder = self.folder(saved)
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replaced = folder.with_name(f"{folder.name}{_REPLACED}")
        if folder.exists():
            move_directory(folder, replaced)
        move_directory(incoming, folder)
        remove_directory(replaced)
        return saved

    def _discard(self, folder: Path) -> None:
        """Remove a directory. After a crash, a checkpoint is complete or gone."""
        if folder.exists():
            # On a full disk, a directory can be renamed, but none can be created.
            gone = self._folder / _INCOMING / uuid.uuid4().hex
            folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
