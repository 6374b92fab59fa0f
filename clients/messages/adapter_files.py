"""Reads an adapter's files for an upload, and writes those of an export."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from turret.clients.messages.fields import not_of_type
from turret.clients.messages.requests import filled
from turret.clients.words import Text, say
from turret.v1 import adapters_pb2

_CHUNK_BYTES = 256 << 10
# Files of a chat template and, if an adapter adds tokens, of its tokenizer.
_TEMPLATE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_TOKENIZER = ("tokenizer.json", "added_tokens.json")
_HEADER_BYTES = 16 << 20
# Limits on the search for adapters, newest checkpoints first, below a directory that is not one.
_MOST_SHOWN = 5
_MOST_LEVELS = 3
# A trainer's own pickle files. They do not mean that the weights are pickled.
_TRAINERS_OWN = ("training_args.bin", "optimizer.bin", "scheduler.bin")
_HUB = "hub:"
# File names only, not hidden and without directories: an export never writes outside its folder.
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def upload_messages(
    name: str, directory: str | os.PathLike[str], **options: Any
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """Return the messages of one upload: the header, then the files in pieces.

    The files are ``adapter_config.json``, every ``*.safetensors`` of the directory, the chat
    template and, if the weights change the vocabulary, the tokenizer. Nothing else is sent, because
    a training run leaves optimizer states and other private files beside them. ``options`` are
    other fields of ``UploadHeader``.

    Raises:
        FileNotFoundError: ``adapter_config.json`` or the weights are missing.
        PermissionError: The directory is not readable.
        ValueError: A file is empty.
    """
    header = filled(adapters_pb2.UploadHeader(), name=name, **options)
    directory = _path(directory)
    if directory.is_dir() and not os.access(directory, os.R_OK | os.X_OK):
        raise PermissionError(errno.EACCES, say("DIRECTORY_NOT_READABLE"), str(directory))
    paths = [directory / "adapter_config.json", *sorted(directory.glob("*.safetensors"))]
    if not paths[0].is_file() or len(paths) == 1:
        raise FileNotFoundError(_lacking(directory))
    beside = _TEMPLATE + (_TOKENIZER if any(map(_has_vocabulary, paths[1:])) else ())
    paths += [path for name in beside if (path := directory / name).is_file()]
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        if not size:
            raise ValueError(say("FILE_EMPTY", path=path))
        header.files.add(path=path.name, size_bytes=size, sha256=digest)
    return _messages(header, paths)


def _path(directory: object) -> Path:
    if not isinstance(directory, str | os.PathLike):
        raise not_of_type("directory", "a path", directory)
    return Path(directory)


def _has_vocabulary(path: Path) -> bool:
    """Whether tensors of the embedding or the head are present, so that tokens may be added."""
    with path.open("rb") as file:
        size = min(int.from_bytes(file.read(8), "little"), _HEADER_BYTES)
        names = file.read(size)
    return any(name in names for name in (b"embed_tokens", b"lm_head"))


def _lacking(directory: Path) -> Text:
    """The error for a directory that is not an adapter, with the next step."""
    if str(directory).startswith(_HUB) and not directory.exists():
        return say("ADAPTER_ON_HUB", path=directory)
    if not directory.exists():
        return say("PATH_MISSING", path=directory)
    if not directory.is_dir():
        return say("NOT_AN_ADAPTER_DIRECTORY", path=directory)
    if (directory / "adapter_config.json").is_file():
        pickles = _pickles(directory)
        if not pickles:
            return say("NO_SAFETENSORS", path=directory)
        return say("ADAPTER_IS_PICKLED", path=directory, file=pickles[0])
    below = _adapters_below(directory)
    if len(below) == 1:
        return say("ADAPTER_BELOW", path=directory, closest=str(directory / below[0]))
    if below:
        shown = ", ".join(below[-_MOST_SHOWN:]) + (", …" if len(below) > _MOST_SHOWN else "")
        return say("ADAPTERS_BELOW", path=directory, count=len(below), names=shown)
    if pickles := _pickles(directory):
        return say("ADAPTER_IS_PICKLED", path=directory, file=pickles[0])
    if (directory / "config.json").is_file() and any(directory.glob("model*.safetensors")):
        return say("ADAPTER_IS_A_MODEL", path=directory)
    return say("NO_ADAPTER_CONFIG", path=directory)


def _pickles(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.glob("*.bin") if p.name not in _TRAINERS_OWN)


def _adapters_below(directory: Path) -> list[str]:
    """The adapters below a directory, the nearest first, by their relative paths."""
    for depth in range(1, _MOST_LEVELS + 1):
        found = directory.glob("*/" * depth + "adapter_config.json")
        below = [str(path.parent.relative_to(directory)) for path in found]
        if below := [path for path in below if not path.startswith(".") and "/." not in path]:
            return sorted(below, key=_numbered)
    return []


def _numbered(name: str) -> tuple[str | int, ...]:
    """A sort key that puts ``checkpoint-1000`` after ``checkpoint-500``."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def _messages(
    header: adapters_pb2.UploadHeader, paths: list[Path]
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    yield adapters_pb2.UploadAdapterRequest(header=header)
    for path in paths:
        with path.open("rb") as file:
            while data := file.read(_CHUNK_BYTES):
                chunk = adapters_pb2.FileChunk(path=path.name, data=data)
                yield adapters_pb2.UploadAdapterRequest(chunk=chunk)


class NewDirectory:
    """Writes files to a new directory, which appears only once every file is complete.

    Use it as a context manager. A block that ends without :meth:`complete` leaves nothing behind,
    neither files nor parent directories.

    Raises:
        FileExistsError: The directory already exists.
        OSError: The directory cannot be created.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = _path(directory)
        if self._directory.exists():
            raise FileExistsError(say("PATH_EXISTS", path=self._directory))
        parent = self._directory.parent
        self._made = [above for above in self._directory.parents if not above.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._partial = Path(tempfile.mkdtemp(prefix=f".{self._directory.name}.", dir=parent))
        except OSError as error:
            self._remove_made()
            # Name the requested directory, not the temporary one beside it.
            why = f"cannot be created: {error.strerror}"
            raise OSError(error.errno, why, str(self._directory)) from None
        self._open: dict[str, BinaryIO] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for file in self._open.values():
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)
        self._remove_made()

    def _remove_made(self) -> None:
        for above in self._made:
            # Remove the innermost directory first; one that is not empty stays.
            with contextlib.suppress(OSError):
                above.rmdir()

    def append(self, name: str, data: bytes) -> None:
        """Add bytes to a file, which is created if it is new.

        Raises:
            ValueError: The name is a path.
        """
        if name not in self._open:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(say("EXPORT_FILE_NAME", name=name))
            self._open[name] = (self._partial / name).open("xb")
        self._open[name].write(data)

    def complete(self) -> None:
        """Move the files into place.

        Raises:
            FileExistsError: The directory has appeared meanwhile.
        """
        for file in self._open.values():
            file.close()
        # mkdtemp made the directory private, but an export is an ordinary directory.
        self._partial.chmod(0o755)
        try:
            self._partial.rename(self._directory)
        except OSError as error:
            raise FileExistsError(say("PATH_EXISTS", path=self._directory)) from error


class ExportWriter(NewDirectory):
    """Writes an export of an adapter; arguments and errors are those of :class:`NewDirectory`."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__(directory)
        self._expected: dict[str, adapters_pb2.FileInfo] = {}
        self._adapter: adapters_pb2.Adapter | None = None

    def write(self, message: adapters_pb2.ExportAdapterResponse) -> None:
        """Take the next message of the stream.

        Raises:
            ValueError: The message breaks the order that the RPC promises, or names a path.
        """
        match message.WhichOneof("part"):
            case "header" if self._adapter is None:
                self._adapter = message.header.adapter
                for info in message.header.files:
                    if info.path in self._expected:
                        raise ValueError(say("EXPORT_FILE_NAME", name=info.path))
                    self._expected[info.path] = info
                    self.append(info.path, b"")
            case "chunk" if message.chunk.path in self._expected:
                self.append(message.chunk.path, message.chunk.data)
            case _:
                raise ValueError(say("EXPORT_OUT_OF_ORDER"))

    def finish(self) -> adapters_pb2.Adapter:
        """Check every file's size and digest, move them into place and return the adapter.

        Raises:
            ValueError: A file is incomplete or garbled, or the server sent nothing.
            FileExistsError: The directory has appeared meanwhile.
        """
        if self._adapter is None:
            raise ValueError(say("EXPORT_WITHOUT_HEADER"))
        for name, info in self._expected.items():
            self._open[name].close()
            with (self._partial / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
            if size != info.size_bytes or (info.sha256 and info.sha256 != digest):
                raise ValueError(say("EXPORT_FILE_DAMAGED", name=name))
        self.complete()
        return self._adapter
