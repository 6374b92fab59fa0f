"""Reads an adapter's files for an upload, and writes those of an export."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from turret.clients.fields import not_of_type
from turret.clients.requests import filled
from turret.clients.words import say
from turret.v1 import adapters_pb2

_CHUNK_BYTES = 256 << 10
# Files of a chat template and, if an adapter adds tokens, of its tokenizer.
_TEMPLATE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_TOKENIZER = ("tokenizer.json", "added_tokens.json")
_HEADER_BYTES = 16 << 20
# File names only, not hidden and without directories: an export never writes outside its folder.
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def upload_messages(
    name: str, directory: str | os.PathLike[str], **options: Any
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """Return the messages of one upload: the header, then the files in pieces.

    The files are ``adapter_config.json``, every ``*.safetensors`` of the directory, the chat
    template and, if the weights change the vocabulary, the tokenizer. Nothing else is sent, because
    a training run leaves optimizer states and other private files alongside them. ``options`` are
    other fields of ``UploadHeader``.

    Raises:
        OSError: The directory cannot be read, or is not an adapter.
        ValueError: A file is empty.
    """
    header = filled(adapters_pb2.UploadHeader(), name=name, **options)
    directory = _path(directory)
    files = {path.name: path for path in sorted(directory.iterdir()) if path.is_file()}
    weights = [path for name, path in files.items() if name.endswith(".safetensors")]
    if "adapter_config.json" not in files or not weights:
        raise FileNotFoundError(say("ADAPTER_FILES_MISSING", path=directory))
    beside = _TEMPLATE + (_TOKENIZER if any(map(_has_vocabulary, weights)) else ())
    others = [files[name] for name in beside if name in files]
    paths = [files["adapter_config.json"], *weights, *others]
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
    """Whether a file contains tensors of the embedding or the head, which may add tokens."""
    with path.open("rb") as file:
        size = min(int.from_bytes(file.read(8), "little"), _HEADER_BYTES)
        names = file.read(size)
    return any(name in names for name in (b"embed_tokens", b"lm_head"))


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
            # Name the requested directory, not the temporary one next to it.
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
            ValueError: The name is a path, or that of a hidden file.
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
        """Check every file's size and digest, move the files into place and return the adapter.

        Raises:
            ValueError: A file is incomplete or damaged, or the server sent nothing.
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
