"""The directory with which the registry survives a restart.

    LOCK                       held by the one server that uses the directory
    base.json                  the base model of the adapters
    adapters/<name>.json       one registration per file
    aliases/<name>.json        one alias per file
    files/<uuid>.<generation>/ the files of an uploaded generation
    incoming/<random>/         a running upload; emptied at the start

Only the registrations' files count. Other content of ``files/`` is left over from a crash or from a
generation that was in use at the time, and is removed at the start. An operation writes files first
and the registration last, so a crash leaves the state before it or the state after it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from turret.server import log
from turret.server.adapters.adapter import Adapter, AdapterFacts, Alias, AliasTarget, Source
from turret.server.basics.files import (
    PARTIAL_SUFFIX,
    move_directory,
    remove_directory,
    remove_file,
    replace_file,
    reporting_disk_faults,
    sync_directory,
)
from turret.server.errors import (
    BudgetExceededError,
    InvalidRequestError,
    StateDirRequiredError,
    StorageFullError,
)
from turret.server.words import Text, say

# Registrations, each saved in a file of the state directory.


# Raise the version when fields change, and keep reading older ones. Version 2 added components to
# the facts, 3 a source's task, 4 the invocation, 5 labels, 6 the size of the vocabulary and the
# tokenizer, 7 the first pass, 8 the chat template, 9 kept generations.
_VERSION = 9
_READ_VERSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 9)


@functools.lru_cache(maxsize=4096)
def _shared(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """One shared tuple for all adapters with the same values, which most of them have."""
    return values


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
            ValueError: The file has another form.
        """
        fields = json.loads(data)
        if not isinstance(fields, dict) or fields.pop("version", None) not in _READ_VERSIONS:
            raise ValueError(f"is not a registration of version {_VERSION} or earlier")
        try:
            name, kept = fields["name"], fields.pop("kept", [])
            generations = tuple(_generation(SavedGeneration, name, each) for each in kept)
            return dataclasses.replace(_generation(cls, name, fields), kept=generations)
        except (KeyError, TypeError) as error:
            raise ValueError(f"is not a registration: {error}") from None


_G = TypeVar("_G", SavedGeneration, SavedRegistration)


def _generation(kind: type[_G], name: str, fields: Any) -> _G:
    if not isinstance(fields, dict):
        raise TypeError("must be an object")
    source = Source(**_typed(Source, fields.pop("source")))
    if source.is_upload:
        source = dataclasses.replace(source, adapter=name)
    facts = AdapterFacts(**_typed(AdapterFacts, fields.pop("facts")))
    return kind(source=source, facts=facts, **_typed(kind, fields))


# Annotations are strings in this module, so these names identify the types.
_TYPES: Mapping[str, Any] = {"str": str, "int": int, "bool": bool, "float": float}
_OPTIONAL = " | None"


def _typed(kind: Any, values: Any) -> dict[str, Any]:
    """The values, checked against the fields' types; lists become shared tuples.

    Raises:
        TypeError: They are not an object, or one of them has another type.
    """
    if not isinstance(values, dict):
        raise TypeError("must be an object")
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        wanted = types.get(name, "")
        if wanted.endswith(_OPTIONAL):
            wanted = "" if value is None else wanted.removesuffix(_OPTIONAL)
        if wanted in _TYPES and type(value) is not _TYPES[wanted]:
            raise TypeError(f"{name} must be of type {wanted}")
        if wanted.startswith("tuple"):
            item = _TYPES[wanted.removeprefix("tuple[").removesuffix(", ...]")]
            if not isinstance(value, list) or any(type(part) is not item for part in value):
                raise TypeError(f"{name} must be a list of {item.__name__}")
            value = _shared(tuple(value))
        elif name in ("method", "base_model", "chat_template") and isinstance(value, str):
            value = sys.intern(value)
        checked[name] = value
    return checked


# Uploads: either all files of an adapter arrive, or none is kept.


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """An announced file.

    Attributes:
        name: Plain file name; the caller has checked it.
        size_bytes: Exact size.
        sha256: Lower-case hex, or "" for unchecked.
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
    """

    def __init__(self, directory: Path, files: Sequence[UploadedFile]) -> None:
        self.directory = directory
        self._missing = {file.name: file for file in files}
        self._lock = threading.Lock()
        self._current: UploadedFile | None = None
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._written = 0
        self._is_over = False

    def announce(self, file: UploadedFile) -> None:
        """Adds a file, whose name is new, to those that must arrive; the caller checks the room."""
        with self._lock:
            self._missing[file.name] = file

    def write(self, name: str, data: bytes) -> None:
        """Appends to a file.

        Raises:
            InvalidRequestError: Not an announced file, out of order, or longer than announced.
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
        """Checks that everything has arrived, and makes it durable.

        Raises:
            InvalidRequestError: A file is missing or short.
        """
        with self._lock, reporting_disk_faults():
            self._check_open()
            for name in self._missing:
                got = self._written if self._current and self._current.name == name else 0
                size = self._missing[name].size_bytes
                raise _refuse(name, say("FILE_CUT_SHORT", found=got, needed=size))
            sync_directory(self.directory)

    def move(self, target: Path) -> None:
        """Gives the finished files to the caller, at ``target``; ``discard`` does nothing then."""
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

# An upload must leave this much disk space, so that registrations can still be written.
MIN_FREE_BYTES = 16 << 20


class StateDir:
    """Thread-safe for different names; one change of a name at a time.

    Args:
        path: The directory, made if it does not exist.
        max_upload_bytes: The maximum size of one upload.

    Raises:
        OSError: The directory cannot be used.
        ValueError: Another server uses it.
    """

    def __init__(self, path: Path, max_upload_bytes: int) -> None:
        self.path = path.resolve()
        self._max_upload_bytes = max_upload_bytes
        self._adapters = self.path / "adapters"
        self._aliases = self.path / "aliases"
        self._files = self.path / "files"
        self._incoming = self.path / "incoming"
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _lock(self.path / "LOCK")
        for directory in (self._adapters, self._aliases, self._files, self._incoming):
            directory.mkdir(exist_ok=True, mode=0o700)

    def close(self) -> None:
        """Lets another server use the directory; nothing may be written any more."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def bind(self, base_name: str, base_digest: str) -> None:
        """Ties the directory to a base model, the first time; later checks that it is the same.

        Raises:
            ValueError: The directory belongs to another base model.
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
        """Every registration, by name, after removing incomplete files from a crash.

        A file that cannot be read is reported and kept, and then all uploaded files are kept too.

        Args:
            sweeps: Whether to remove uploads without a registration. In a directory that a fleet
                shares, other processes may be using them.
        """
        found, is_complete = _read_all(self._adapters, SavedRegistration.from_json)
        if not sweeps:
            return found
        for path in self._incoming.iterdir():
            remove_directory(path)
        if is_complete:
            sources = [each.source for saved in found for each in (saved, *saved.kept)]
            kept = {source.path for source in sources if source.is_upload}
            for path in self._files.iterdir():
                if str(path.relative_to(self.path)) not in kept:
                    remove_directory(path)
        return found

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
        """Saves a registration, to be restored after a restart.

        Raises:
            StorageFullError: The disk is full; what was saved before still holds.
        """
        with reporting_disk_faults():
            replace_file(self._adapters / _file_name(saved.name), saved.to_json())

    def remove(self, name: str) -> None:
        """Forgets a registration; the caller discards its files."""
        with reporting_disk_faults():
            remove_file(self._adapters / _file_name(name))

    def read_aliases(self) -> list[Alias]:
        """Every alias, by name; see ``read``."""
        return _read_all(self._aliases, _alias_from_json)[0]

    def save_alias(self, alias: Alias) -> None:
        """Saves an alias, to be restored after a restart.

        Raises:
            StorageFullError: The disk is full; what was saved before still holds.
        """
        fields = {**dataclasses.asdict(alias), "version": 1}
        with reporting_disk_faults():
            replace_file(
                self._aliases / _file_name(alias.name), json.dumps(fields, indent=1).encode()
            )

    def remove_alias(self, name: str) -> None:
        """Forgets an alias."""
        with reporting_disk_faults():
            remove_file(self._aliases / _file_name(name))

    def stage(self, files: Sequence[UploadedFile]) -> StagedUpload:
        """Makes room for an upload.

        Raises:
            BudgetExceededError: The upload is larger than the server's limit.
            StorageFullError: The disk has no room for it.
        """
        self.check_room(sum(file.size_bytes for file in files))
        return stage_below(self._incoming, files)

    def check_room(self, num_bytes: int, received: int = 0) -> None:
        """Raises what ``stage`` raises for files of this size.

        ``received`` bytes of them are on the disk already, or are not written to it.
        """
        check_room_in(self.path, num_bytes, self._max_upload_bytes, received)

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


def _file_name(name: str) -> str:
    """The file of an adapter or alias; no name contains a plus."""
    return f"{name.replace('/', '+')}.json"


_S = TypeVar("_S", SavedRegistration, Alias)


def _read_all(directory: Path, parse: Callable[[bytes], _S]) -> tuple[list[_S], bool]:
    """What the files of a directory contain, by name, and whether all of them can be read."""
    found: list[_S] = []
    is_complete = True
    for path in sorted(directory.iterdir()):
        if path.name.endswith(PARTIAL_SUFFIX):
            path.unlink()
            continue
        try:
            saved = parse(path.read_bytes())
            if path.name != _file_name(saved.name):
                raise ValueError(f"is that of {saved.name!r}")
        except (OSError, ValueError) as error:
            _log.error("cannot restore", extra=log.fields(file=path, reason=error))
            is_complete = False
            continue
        found.append(saved)
    return found, is_complete


def _alias_from_json(data: bytes) -> Alias:
    fields = json.loads(data)
    if not isinstance(fields, dict) or fields.pop("version", None) != 1:
        raise ValueError("is not an alias of version 1")
    try:
        targets = tuple(AliasTarget(**_typed(AliasTarget, each)) for each in fields.pop("targets"))
        if not targets:
            raise TypeError("has no targets")
        return Alias(targets=targets, **_typed(Alias, fields))
    except (KeyError, TypeError) as error:
        raise ValueError(f"is not an alias: {error}") from None


def stage_below(incoming: Path, files: Sequence[UploadedFile]) -> StagedUpload:
    """An empty upload in a separate directory."""
    with reporting_disk_faults():
        return StagedUpload(Path(tempfile.mkdtemp(dir=incoming)), files)


def source_of(staged: StagedUpload, state_dir: Path, name: str) -> Source:
    """The source of a staged upload for adapter ``name`` until it is adopted."""
    return Source(str(staged.directory.relative_to(state_dir)), is_upload=True, adapter=name)


def check_room_in(path: Path, num_bytes: int, most: int, received: int) -> None:
    """See ``StateDir.check_room``."""
    if num_bytes > most:
        raise BudgetExceededError(say("UPLOAD_TOO_LARGE", bytes=num_bytes, max_upload_bytes=most))
    with reporting_disk_faults():
        free = shutil.disk_usage(path).free
    needed = num_bytes - received + MIN_FREE_BYTES
    if needed > free:
        shown = {"free_bytes": free, "needed_bytes": needed}
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


class NoStateDir:
    """Replaces ``StateDir`` in a server without ``--state-dir``.

    Registrations do not survive a restart, and adapters cannot be uploaded or fused.
    """

    path: Path | None = None

    def close(self) -> None:
        pass

    def read(self) -> list[SavedRegistration]:
        return []

    def save(self, adapter: Adapter, **saved: object) -> None:
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

    def adopt(self, staged: StagedUpload, adapter: Adapter) -> NoReturn:
        raise _required()


def _required() -> StateDirRequiredError:
    return StateDirRequiredError(say("STATE_DIR_REQUIRED"))


class SharedStateDir(NoStateDir):
    """A fleet's state directory, for its replicas.

    A replica reads it and stages uploads in it; only the fleet's registry changes anything else.

    Args:
        path: The directory, which the registry has made.
        max_upload_bytes: Maximum size of one upload.
    """

    def __init__(self, path: Path, max_upload_bytes: int) -> None:
        self._path = self.path = path.resolve()
        self._max_upload_bytes = max_upload_bytes

    def stage(self, files: Sequence[UploadedFile]) -> StagedUpload:
        """See ``StateDir.stage``."""
        self.check_room(sum(file.size_bytes for file in files))
        return stage_below(self._path / "incoming", files)

    def check_room(self, num_bytes: int, received: int = 0) -> None:
        """See ``StateDir.check_room``."""
        check_room_in(self._path, num_bytes, self._max_upload_bytes, received)

    def staged_source(self, staged: StagedUpload, name: str) -> Source:
        """See ``StateDir.staged_source``."""
        return source_of(staged, self._path, name)
