"""The directory that lets the registry survive a restart.

    LOCK                        held by the one server that uses the directory
    base.json                   the base model of the adapters
    adapters/<name>.json        one registration per file
    aliases/<name>.json         one alias per file
    files/<uuid>.<generation>/  the files of an uploaded generation
    incoming/<random>/          an unfinished upload; removed at startup

In ``files/``, only directories that a registration names are valid. Other content is left over from
a crash, from a generation that was still in use at shutdown, or from a private adapter, which has
no registration here. It is removed at startup. An operation writes files first and the registration
last, so after a crash, the directory is as before or as after the operation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from turret.server import log
from turret.server.adapters.adapter import Adapter, AdapterFacts, Alias, Source
from turret.server.basics.files import (
    PARTIAL_SUFFIX,
    move_directory,
    read_regular,
    remove_directory,
    remove_file,
    replace_file,
    reporting_disk_faults,
    sync_directory,
)
from turret.server.basics.names import is_private
from turret.server.errors import (
    BudgetExceededError,
    InvalidRequestError,
    StateDirRequiredError,
    StorageFullError,
)
from turret.server.words import Text, say

# Raise the version when fields change, and continue to read older ones. Version 2 added components
# to the facts, 3 a source's task, 4 the invocation, 5 labels, 6 the size of the vocabulary and the
# tokenizer, 7 the first pass, 8 the chat template, 9 kept generations, 10 a source's origin.
_VERSION = 10
_READ_VERSIONS = range(1, _VERSION + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedGeneration:
    """A replaced generation that requests may still name."""

    generation: int
    source: Source
    facts: AdapterFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRegistration:
    """The part of a registration that survives a restart; weights are read again when needed."""

    name: str
    uuid: str
    generation: int
    pinned: bool
    source: Source
    facts: AdapterFacts
    kept: tuple[SavedGeneration, ...] = ()

    def to_json(self) -> bytes:
        fields: dict[str, Any] = {**dataclasses.asdict(self), "version": _VERSION}
        for each in (fields, *fields["kept"]):
            # The registration's own name field holds this already.
            del each["source"]["adapter"]
        return json.dumps(fields, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> SavedRegistration:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: The data has another form.
        """
        saved = _parse("a registration", _REGISTRATION, data, _READ_VERSIONS)
        kept = tuple(_completed(generation, saved.name) for generation in saved.kept)
        return dataclasses.replace(_completed(saved, saved.name), kept=kept)


_G = TypeVar("_G", SavedGeneration, SavedRegistration)
_S = TypeVar("_S", SavedRegistration, Alias)
_REGISTRATION, _ALIAS = TypeAdapter(SavedRegistration), TypeAdapter(Alias)
# Facts that are equal for many adapters, which therefore share one object for each value.
_ALIKE = ("method", "ranks", "target_modules", "base_model", "warnings", "labels", "chat_template")


@functools.lru_cache(maxsize=4096)
def _shared(value: Any) -> Any:
    return value


def _completed(saved: _G, name: str) -> _G:
    """Restores the name of an upload's source, and shares facts with other adapters."""
    source, facts = saved.source, saved.facts
    if source.is_upload:
        # The server removes this directory with the adapter, so it must be below ``files/``.
        if not source.path.startswith("files/") or ".." in Path(source.path).parts:
            raise ValueError("its files are outside the state directory")
        source = dataclasses.replace(source, adapter=name)
    alike = {field: _shared(getattr(facts, field)) for field in _ALIKE}
    return dataclasses.replace(saved, source=source, facts=dataclasses.replace(facts, **alike))


def _parse(kind: str, adapter: TypeAdapter[_S], data: bytes, versions: Sequence[int]) -> _S:
    """Reads a JSON object that also has a version.

    Raises:
        ValueError: The version is not supported, or a field is unknown, missing or of a wrong type.
    """
    fields = json.loads(data)
    if not isinstance(fields, dict) or fields.pop("version", None) not in versions:
        raise ValueError(f"is not {kind} of version {versions[-1]} or earlier")
    # Replace halves of surrogate pairs, which earlier versions accepted, because no message can
    # contain them.
    data = json.dumps(fields, ensure_ascii=False).encode(errors="replace")
    try:
        return adapter.validate_json(data, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"is not {kind}: {field}: {first['msg']}") from None


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A file of an upload, as announced before its data.

    Attributes:
        name: Plain file name; the caller has checked it.
        size_bytes: Exact size.
        sha256: Lower-case hex; "" if the content is not to be checked.
    """

    name: str
    size_bytes: int
    sha256: str = ""


class StagedUpload:
    """Writes announced files to a separate directory.

    Methods block on the disk; they may be called from different threads, and ``discard`` at any
    time.

    Args:
        directory: An existing, empty directory, owned by this object until it is moved.
        files: The announced files; names are distinct.

    Attributes:
        directory: The directory.
        origin: Where the server fetches the files from; empty if a client sends them.
    """

    def __init__(self, directory: Path, files: Sequence[UploadedFile]) -> None:
        self.directory = directory
        self.origin = ""
        self._missing = {file.name: file for file in files}
        self._lock = threading.Lock()
        self._current: UploadedFile | None = None
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._written = 0
        self._is_over = False

    def announce(self, file: UploadedFile) -> None:
        """Adds a file with a new name to those that must arrive. The caller checks free space."""
        with self._lock:
            self._missing[file.name] = file

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Appends to a file.

        Raises:
            InvalidRequestError: The file was not announced, is longer than announced, has another
                SHA-256, or begins before the previous file is complete; or the upload is over.
            StorageFullError: The disk is full.
        """
        with self._lock, reporting_disk_faults():
            self._check_open()
            if self._current is None or self._current.name != name:
                self._begin(name)
            assert self._current is not None
            assert self._file is not None
            self._written += len(data)
            if self._written > self._current.size_bytes:
                raise _refuse(name, say("LONGER_THAN_ANNOUNCED", size=self._current.size_bytes))
            self._file.write(data)
            self._hash.update(data)
            if self._written == self._current.size_bytes:
                self._complete()

    def finish(self) -> None:
        """Checks that all announced files are complete, and makes them durable.

        Raises:
            InvalidRequestError: A file is missing or too short.
        """
        with self._lock, reporting_disk_faults():
            self._check_open()
            for name in self._missing:
                got = self._written if self._current and self._current.name == name else 0
                size = self._missing[name].size_bytes
                raise _refuse(name, say("FILE_CUT_SHORT", found=got, needed=size))
            sync_directory(self.directory)

    def move(self, target: Path) -> None:
        """Moves the finished files to ``target``. After that, ``discard`` does nothing."""
        with self._lock:
            self._check_open()
            assert not self._missing, "finish comes first"
            move_directory(self.directory, target)
            self._is_over = True

    def discard(self) -> None:
        """Removes the received files, unless they were moved. Harmless to repeat."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
            if not self._is_over:
                self._is_over = True
                remove_directory(self.directory)

    def _begin(self, name: str) -> None:
        if self._current is not None:
            raise _refuse(name, say("FILES_INTERLEAVE", other=self._current.name))
        if name not in self._missing:
            raise _refuse(name, say("FILE_NOT_ANNOUNCED"))
        self._current, self._written = self._missing[name], 0
        self._hash = hashlib.sha256()
        self._file = (self.directory / name).open("xb")

    def _complete(self) -> None:
        assert self._current is not None
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        name, expected = self._current.name, self._current.sha256
        if expected and expected != self._hash.hexdigest():
            raise _refuse(name, say("WRONG_SHA256"))
        del self._missing[name]
        self._current = None

    def _check_open(self) -> None:
        if self._is_over:
            raise InvalidRequestError(say("UPLOAD_OVER"))


def _refuse(name: str, why: Text) -> InvalidRequestError:
    text = say("BAD_FILE", file=name, why=why)
    return InvalidRequestError(text, violations=[("chunk", text)])


_log = logging.getLogger(__name__)

# An upload must leave this much disk space free, so that registrations can still be written.
MIN_FREE_BYTES = 16 << 20


class NoStateDir:
    """Stands in for ``StateDir``, its subclass, in a server without ``--state-dir``.

    Registrations do not survive a restart, and adapters cannot be uploaded or fused.
    """

    @property
    def path(self) -> Path | None:
        """The directory, if there is one."""
        return None

    def close(self) -> None:
        pass

    def bind(self, base_name: str, base_digest: str) -> None:
        pass

    def read(self) -> list[SavedRegistration]:
        return []

    def save(
        self,
        adapter: Adapter,
        *,
        pinned: bool,
        kept: Sequence[Adapter],
        source: Source | None = None,
    ) -> None:
        """Saves a generation as the one that its name has after a restart.

        Args:
            adapter: The generation.
            pinned: Whether it is pinned after a restart.
            kept: Replaced generations of the name that requests may name after a restart.
            source: The future location of its files; None for the present one.

        Raises:
            StorageFullError: The disk is full; what was saved before still holds.
        """
        if is_private(adapter.name):
            # A private adapter belongs to a training session and does not survive a restart.
            return
        saved = SavedRegistration(
            name=adapter.name,
            uuid=adapter.uuid,
            generation=adapter.generation,
            pinned=pinned,
            source=source or adapter.source,
            facts=adapter.facts,
            kept=tuple(
                SavedGeneration(generation=a.generation, source=a.source, facts=a.facts)
                for a in kept
            ),
        )
        self.write(saved)

    def write(self, saved: SavedRegistration) -> None:
        pass

    def remove(self, name: str) -> None:
        pass

    def read_aliases(self) -> list[Alias]:
        return []

    def save_alias(self, alias: Alias) -> None:
        pass

    def remove_alias(self, name: str) -> None:
        pass

    def discard(self, source: Source) -> None:
        pass

    def stage(self, files: Sequence[UploadedFile]) -> StagedUpload:
        raise _required()

    def check_room(self, num_bytes: int, received: int = 0) -> None:
        raise _required()

    def staged_source(self, staged: StagedUpload, name: str) -> Source:
        raise _required()

    def adopt(self, adapter: Adapter, put: Callable[[Path], object]) -> None:
        raise _required()


def _required() -> StateDirRequiredError:
    return StateDirRequiredError(say("STATE_DIR_REQUIRED"))


class SharedStateDir(NoStateDir):
    """A state directory that another process owns; this process only stages uploads in it.

    A fleet's replicas use this class. They read the directory, and only the fleet's registry
    changes anything else in it.

    Args:
        path: The directory, which the registry has made.
        max_upload_bytes: The maximum size of one upload.
    """

    def __init__(self, path: Path, max_upload_bytes: int) -> None:
        self._path = path.resolve()
        self._max_upload_bytes = max_upload_bytes
        self._incoming = self._path / "incoming"

    @property
    def path(self) -> Path:
        return self._path

    def stage(self, files: Sequence[UploadedFile]) -> StagedUpload:
        """Makes a separate directory for an upload, after checking that there is room.

        Raises:
            BudgetExceededError: The upload is larger than the server's limit.
            StorageFullError: The disk has no room for it.
        """
        self.check_room(sum(file.size_bytes for file in files))
        with reporting_disk_faults():
            return StagedUpload(Path(tempfile.mkdtemp(dir=self._incoming)), files)

    def check_room(self, num_bytes: int, received: int = 0) -> None:
        """Raises what ``stage`` raises for files of this size.

        ``received`` bytes of them are already on the disk, or will not be written to it.
        """
        most = self._max_upload_bytes
        if num_bytes > most:
            text = say("UPLOAD_TOO_LARGE", bytes=num_bytes, max_upload_bytes=most)
            raise BudgetExceededError(text)
        with reporting_disk_faults():
            free = shutil.disk_usage(self.path).free
        needed = num_bytes - received + MIN_FREE_BYTES
        if needed > free:
            shown = {"free_bytes": free, "needed_bytes": needed}
            raise StorageFullError(say("STATE_DISK_FULL", bytes=num_bytes, **shown))

    def staged_source(self, staged: StagedUpload, name: str) -> Source:
        """The source of a staged upload for adapter ``name`` until it is adopted."""
        path = str(staged.directory.relative_to(self.path))
        return Source(path, is_upload=True, adapter=name, origin=staged.origin)


class StateDir(SharedStateDir):
    """The state directory of a server. Thread-safe, but only one change of a name at a time.

    Args:
        path: The directory, made if it does not exist.
        max_upload_bytes: The maximum size of one upload.

    Raises:
        OSError: The directory cannot be used.
        ValueError: Another server uses it.
    """

    def __init__(self, path: Path, max_upload_bytes: int) -> None:
        super().__init__(path, max_upload_bytes)
        self._adapters = self.path / "adapters"
        self._aliases = self.path / "aliases"
        self._files = self.path / "files"
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.path.stat().st_mode & stat.S_IWOTH:
            _log.warning(
                "every user of this machine can write to the state directory",
                extra=log.fields(state_dir=self.path),
            )
        self._lock = _lock(self.path / "LOCK")
        for directory in (self._adapters, self._aliases, self._files, self._incoming):
            directory.mkdir(exist_ok=True, mode=0o700)

    def close(self) -> None:
        """Lets another server use the directory; nothing may be written any more."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def bind(self, base_name: str, base_digest: str) -> None:
        """Binds the directory to a base model the first time. Later, checks that it is the same.

        Raises:
            ValueError: The directory belongs to another base model.
        """
        path = self.path / "base.json"
        if not path.exists():
            base = {"version": 1, "name": base_name, "digest": base_digest}
            replace_file(path, json.dumps(base, indent=1).encode())
            return
        try:
            base = json.loads(read_regular(path))
            name, digest = base["name"], base["digest"]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise ValueError(say("STATE_BASE_DAMAGED", path=path)) from None
        if digest != base_digest:
            names = {"path": self.path, "found": name, "base_model": base_name}
            digests = {"digest": str(digest), "base_digest": base_digest}
            text = say("STATE_OF_OTHER_BASE", **names, **digests)
            raise ValueError(text)

    def read(self, *, sweeps: bool = True) -> list[SavedRegistration]:
        """Every registration, by name, after removing incomplete files from a crash.

        A registration that cannot be read is logged and kept. All uploaded files are then kept,
        too.

        Args:
            sweeps: Whether to remove uploads without a registration. In a directory that a fleet
                shares, other processes may be using them.
        """
        found, is_complete = _read_all(self._adapters, SavedRegistration.from_json)
        if not sweeps:
            return found
        for saved in found:
            if is_private(saved.name):
                # Earlier versions saved private adapters, too.
                self.remove(saved.name)
        found = [saved for saved in found if not is_private(saved.name)]
        for path in self._incoming.iterdir():
            remove_directory(path)
        if is_complete:
            sources = [each.source for saved in found for each in (saved, *saved.kept)]
            kept = {source.path for source in sources if source.is_upload}
            for path in self._files.iterdir():
                if str(path.relative_to(self.path)) not in kept:
                    remove_directory(path)
        return found

    def write(self, saved: SavedRegistration) -> None:
        """Saves a registration, to be restored after a restart.

        Raises:
            StorageFullError: The disk is full; what was saved before still holds.
        """
        _change(self._adapters / _file_name(saved.name), saved.to_json())

    def remove(self, name: str) -> None:
        """Forgets a registration; the caller discards its files."""
        _change(self._adapters / _file_name(name), None)

    def read_aliases(self) -> list[Alias]:
        """Every alias, by name; see ``read``."""
        return _read_all(self._aliases, _alias_from_json)[0]

    def save_alias(self, alias: Alias) -> None:
        """Saves an alias, to be restored after a restart.

        Raises:
            StorageFullError: The disk is full; what was saved before still holds.
        """
        fields = {**dataclasses.asdict(alias), "version": 1}
        _change(self._aliases / _file_name(alias.name), json.dumps(fields, indent=1).encode())

    def remove_alias(self, name: str) -> None:
        """Forgets an alias."""
        _change(self._aliases / _file_name(name), None)

    def adopt(self, adapter: Adapter, put: Callable[[Path], object]) -> None:
        """Points the adapter to a new directory, which ``put`` makes with the adapter's files."""
        target = self._files / adapter.key
        path = str(target.relative_to(self.path))
        adapter.source = dataclasses.replace(adapter.source, path=path)
        with reporting_disk_faults():
            put(target)

    def discard(self, source: Source) -> None:
        """Removes a generation's files if they were uploaded; others belong to the operator.

        Files that the saved registration names are not removed, because it may have been written
        although the disk reported an error. The next start removes them if the registration no
        longer names them.
        """
        if source.is_upload and source.path not in self._saved_paths(source.adapter):
            remove_directory(self.path / source.path)

    def _saved_paths(self, name: str) -> set[str]:
        try:
            data = read_regular(self._adapters / _file_name(name))
            saved = SavedRegistration.from_json(data)
        except (OSError, ValueError, RecursionError):
            return set()
        return {each.source.path for each in (saved, *saved.kept)}


def open_state_dir(path: Path | None, max_upload_bytes: int) -> NoStateDir:
    """The state directory of a server, if it has one; arguments and errors as for ``StateDir``."""
    return NoStateDir() if path is None else StateDir(path, max_upload_bytes)


def _change(path: Path, data: bytes | None) -> None:
    """Writes a whole file, or removes it.

    Raises:
        StorageFullError, StorageFailedError: The disk failed; the file is restored if possible.
    """
    with reporting_disk_faults():
        before = path.read_bytes() if path.exists() else None
        try:
            _put(path, data)
        except OSError:
            # The file may have changed despite the error, and a restart would find the change.
            with contextlib.suppress(OSError):
                _put(path, before)
            raise


def _put(path: Path, data: bytes | None) -> None:
    if data is None:
        remove_file(path)
    else:
        replace_file(path, data)


def _file_name(name: str) -> str:
    """The file name of an adapter or alias. No adapter name contains a plus."""
    return f"{name.replace('/', '+')}.json"


def _read_all(directory: Path, parse: Callable[[bytes], _S]) -> tuple[list[_S], bool]:
    """Reads the files of a directory, by name; also returns whether all of them can be read."""
    found: list[_S] = []
    is_complete = True
    for path in sorted(directory.iterdir()):
        try:
            if path.name.endswith(PARTIAL_SUFFIX):
                path.unlink()
                continue
            saved = parse(read_regular(path))
            if path.name != _file_name(saved.name):
                raise ValueError(f"is the file of {saved.name!r}")
        except (OSError, ValueError, RecursionError) as error:
            _log.error("cannot restore", extra=log.fields(file=path, reason=error))
            is_complete = False
            continue
        found.append(saved)
    return found, is_complete


def _alias_from_json(data: bytes) -> Alias:
    alias = _parse("an alias", _ALIAS, data, (1,))
    if not alias.targets:
        raise ValueError("has no targets")
    return alias


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # The kernel releases the lock when the process ends, however that happens.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(say("STATE_DIR_IN_USE", path=path.parent)) from None
    return descriptor
