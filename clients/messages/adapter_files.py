"""Reads an adapter's files for an upload, and writes those of an export."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

from turret.clients.messages.adapter_requests import filled
from turret.clients.messages.fields import ArgumentTypeError
from turret.v1 import adapters_pb2

_CHUNK_BYTES = 256 << 10
# Files of a chat template and, if an adapter has its own tokens, of their tokenizer.
_TEMPLATE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_TOKENIZER = ("tokenizer.json", "added_tokens.json")
_HEADER_BYTES = 16 << 20
# Limits on the search for adapters, newest checkpoints first, below a directory that is not one.
_MOST_TOLD = 5
_MOST_LEVELS = 3
# Maximum number of directories to search on each level.
_MOST = 200
# A trainer's pickles, which do not show in which format the weights are stored.
_TRAINERS_OWN = ("training_args.bin", "optimizer.bin", "scheduler.bin")
_HUB = "hub:"
_MAY_NOT = "is not readable by this user"
_EMPTY = "is empty; copy or save it again"
_THERE = "already exists; export to a new directory"
# File names only, not hidden and without directories: an export never writes outside its folder.
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def upload_messages(
    name: str,
    directory: str | os.PathLike[str],
    *,
    pinned: bool,
    replace: bool,
    expected_generation: int | None = None,
    task: int | None = None,
    chat_template: str | None = None,
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """Return the messages of one upload: the header, then the files in pieces.

    The files are ``adapter_config.json``, every ``*.safetensors`` of the directory, the chat
    template and, if the weights change the vocabulary, the tokenizer. Nothing else is sent, because
    a training run leaves optimizer states and other private files beside them.

    Raises:
        FileNotFoundError: ``adapter_config.json`` or the weights are missing.
        PermissionError: The directory is not readable.
        ValueError: A file is empty.
    """
    header = filled(
        adapters_pb2.UploadHeader(),
        name=name,
        pinned=pinned,
        replace=replace,
        expected_generation=expected_generation,
        task=task,
        chat_template=chat_template,
    )
    directory = _path(directory)
    if directory.is_dir() and not os.access(directory, os.R_OK | os.X_OK):
        raise PermissionError(errno.EACCES, _MAY_NOT, str(directory))
    paths = [directory / "adapter_config.json", *sorted(directory.glob("*.safetensors"))]
    if not paths[0].is_file() or len(paths) == 1:
        raise FileNotFoundError(f"{directory}: {_lacking(directory)}")
    beside = _TEMPLATE + (_TOKENIZER if any(map(_has_vocabulary, paths[1:])) else ())
    paths += [path for name in beside if (path := directory / name).is_file()]
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        if not size:
            raise ValueError(f"{path} {_EMPTY}")
        header.files.add(path=path.name, size_bytes=size, sha256=digest)
    return _messages(header, paths)


def _path(directory: object) -> Path:
    if not isinstance(directory, str | os.PathLike):
        raise ArgumentTypeError("directory", f"must be a path, not {directory!r}")
    return Path(directory)


def _has_vocabulary(path: Path) -> bool:
    """Whether tensors of the embedding or the head are present, so that tokens may be added."""
    with path.open("rb") as file:
        size = min(int.from_bytes(file.read(8), "little"), _HEADER_BYTES)
        names = file.read(size)
    return any(name in names for name in (b"embed_tokens", b"lm_head"))


def _lacking(directory: Path) -> str:
    """Why a directory is not an adapter, and what to do."""
    what = "adapter_config.json and a .safetensors file"
    if str(directory).startswith(_HUB) and not directory.exists():
        return "is on a hub; load it instead of uploading it"
    if not directory.is_dir():
        is_there = "is not a directory" if directory.exists() else "does not exist"
        return f"{is_there}; an adapter is a directory with {what}"
    has_config = (directory / "adapter_config.json").is_file()
    below = [] if has_config else _adapters_below(directory)
    if below:
        if len(below) == 1:
            return (
                f"is not an adapter, but has one in it; did you mean {str(directory / below[0])!r}?"
            )
        others = f" and {len(below) - _MOST_TOLD} more" if len(below) > _MOST_TOLD else ""
        shown = f"{', '.join(below[-_MOST_TOLD:])}{others}"
        return f"is not an adapter; pass one of the adapters in it: {shown}"
    pickles = sorted(p.name for p in directory.glob("*.bin") if p.name not in _TRAINERS_OWN)
    if pickles:
        return f"{pickles[0]} is a pickle; save the adapter as safetensors"
    is_model = (directory / "config.json").is_file() and any(directory.glob("model*.safetensors"))
    if is_model and not has_config:
        return "is a whole model, not an adapter"
    lacking = "a .safetensors file" if has_config else "adapter_config.json"
    return f"{lacking} is missing; an adapter has {what}"


def _adapters_below(directory: Path) -> list[str]:
    """The adapters below a directory, the nearest first, by their relative paths."""
    level = [directory]
    for _ in range(_MOST_LEVELS):
        level = list(itertools.islice(itertools.chain.from_iterable(map(_folders, level)), _MOST))
        found = (path for path in level if (path / "adapter_config.json").is_file())
        if below := [str(path.relative_to(directory)) for path in found]:
            return sorted(below, key=_numbered)
    return []


def _folders(directory: Path) -> list[Path]:
    """The subdirectories; none if the directory is unreadable."""
    with contextlib.suppress(OSError):
        return [p for p in directory.iterdir() if not p.name.startswith(".") and p.is_dir()]
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


class ExportWriter:
    """Writes an export to a new directory, which appears only once every file is complete.

    Use it as a context manager. A block that ends without :meth:`finish` leaves nothing behind,
    neither files nor parent directories.

    Raises:
        FileExistsError: The directory already exists.
        OSError: The directory cannot be created.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = _path(directory)
        if self._directory.exists():
            raise FileExistsError(f"{self._directory} {_THERE}")
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
        self._expected: dict[str, adapters_pb2.FileInfo] = {}
        self._open: dict[str, BinaryIO] = {}
        self.adapter: adapters_pb2.Adapter | None = None

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

    def write(self, message: adapters_pb2.ExportAdapterResponse) -> None:
        """Take the next message of the stream.

        Raises:
            ValueError: The message breaks the order that the RPC promises, or names a path.
        """
        match message.WhichOneof("part"):
            case "header" if self.adapter is None:
                self.adapter = message.header.adapter
                for info in message.header.files:
                    if not _FILE_NAME.fullmatch(info.path) or info.path in self._expected:
                        raise ValueError(f"export: unacceptable file name {info.path!r}")
                    self._expected[info.path] = info
                    self._open[info.path] = (self._partial / info.path).open("xb")
            case "chunk" if message.chunk.path in self._open:
                self._open[message.chunk.path].write(message.chunk.data)
            case _:
                raise ValueError("export: a message is out of order")

    def finish(self) -> adapters_pb2.Adapter:
        """Check every file's size and digest, move them into place and return the adapter.

        Raises:
            ValueError: A file is incomplete or garbled, or the server sent nothing.
            FileExistsError: The directory has appeared meanwhile.
        """
        if self.adapter is None:
            raise ValueError("export: the server sent no header")
        for name, info in self._expected.items():
            self._open[name].close()
            with (self._partial / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
            if size != info.size_bytes or (info.sha256 and info.sha256 != digest):
                raise ValueError(f"export: {name} arrived incomplete or garbled")
        # mkdtemp made the directory private, but an export is an ordinary directory.
        self._partial.chmod(0o755)
        try:
            self._partial.rename(self._directory)
        except OSError as error:
            raise FileExistsError(f"{self._directory} {_THERE}") from error
        return self.adapter
