"""An adapter's files on their way in, complete or gone."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from turret.server.basics.files import (
    move_directory,
    remove_directory,
    reporting_disk_faults,
    sync_directory,
)
from turret.server.errors import InvalidRequestError
from turret.server.words import Text, say


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A file as announced.

    Attributes:
        name: Plain file name; the caller has checked it.
        size_bytes: Exact size.
        sha256: Lower-case hex, or "" for unchecked.
    """

    name: str
    size_bytes: int
    sha256: str = ""


class StagedUpload:
    """Writes announced files to a directory of its own.

    Methods block on the disk; they may be called from different threads, and ``discard`` at any
    time.

    Args:
        directory: Exists, empty, owned by this object until it is moved.
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
        """Checks that everything has come, and makes it durable.

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
        """Removes what has come, unless it was moved. Harmless to repeat."""
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
