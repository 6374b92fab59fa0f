"""File operations that a crash leaves either done or not done."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from turret.lazy_torch import torch
from turret.server.basics.names import closest_path
from turret.server.errors import StorageFailedError, StorageFullError
from turret.server.words import Text, say

_log = logging.getLogger(__name__)

# Suffix of a file that is being written next to its target. A crash may leave one behind.
PARTIAL_SUFFIX = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def sync_directory(path: Path) -> None:
    """Makes creations, renames and removals in a directory survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Writes a whole file atomically: readers see either the old or the new content.

    Args:
        path: A path in an existing directory.
        data: The content of the file.
        mode: The permissions of the file.

    Raises:
        OSError: The disk is full or broken; the old file is still there.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def move_directory(source: Path, target: Path) -> None:
    """Renames a directory whose content is already synced. ``target`` must not exist."""
    source.rename(target)
    sync_directory(target.parent)


def remove_file(path: Path) -> None:
    """Removes a file if it exists."""
    path.unlink(missing_ok=True)
    sync_directory(path.parent)


def remove_directory(path: Path) -> None:
    """Removes a directory and its content, if it exists. Not atomic: a crash may leave a part."""
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def reporting_disk_faults() -> Iterator[None]:
    """Reports disk errors to clients without the server's paths.

    Raises:
        StorageFullError: The disk was full in a call in the block.
        StorageFailedError: A call failed for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError(say("DISK_FULL")) from error
        _log.exception("the disk failed")
        problem = os.strerror(error.errno) if error.errno else "unknown"
        raise StorageFailedError(say("DISK_FAILED", problem=problem)) from error


def unwritable(path: Path) -> Text | None:
    """The reason why this user cannot write to or create a directory; None if the user can."""
    if path.exists():
        if not path.is_dir():
            return say("FOLDER_IS_A_FILE")
        if problem := _refused(path):
            return say("FOLDER_NOT_WRITABLE", problem=problem)
        return None
    there = next(folder for folder in path.absolute().parents if folder.exists())
    problem = _refused(there)
    return say("FOLDER_NOT_CREATABLE", folder=there, problem=problem) if problem else None


def _refused(folder: Path) -> str:
    """The error of an attempt to write, or an empty text.

    Permissions alone do not suffice: on file systems such as /proc, they mean little.
    """
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".turret-", dir=folder))
    except OSError as error:
        # Ignore a full disk, because files may be removed from it.
        return "" if error.errno in _FULL else error.strerror or str(error)
    return ""


# Files named by flags, which may be of an unexpected kind.


def read_regular(path: Path) -> bytes:
    """The contents of a file. A FIFO or a device is rejected, because reading it may never end.

    Raises:
        OSError: The file cannot be read, or is not a regular one.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        return file.read()


def is_there(path: Path) -> bool:
    """Whether a path exists. From Python 3.14, ``Path.exists`` also returns False for other errors.

    Raises:
        OSError: The system cannot tell, for instance because a directory may not be searched.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def unreadable(path: Path, error: OSError) -> Text:
    """The reason why a file named by a user cannot be read."""
    # Unlike `Path.exists`, this supports names that are too long for the system.
    near = None if os.path.exists(path) else closest_path(path, Path.is_file)
    return say("FILE_UNREADABLE", path=path, why=error.strerror, closest=near)


# Git LFS pointers: small files in place of large files that a clone did not fetch.

_LFS_POINTER = b"version https://git-lfs"


def why_lfs_pointer(begin: bytes) -> Text | None:
    """The error for a file that is a Git LFS pointer; None for other files.

    Args:
        begin: The beginning of the file, at least 8 bytes, or the whole file.
    """
    if not begin.startswith(_LFS_POINTER[: max(8, len(begin))]):
        return None
    return say("LFS_POINTER")


# Safetensors files, in parts. The library builds a whole file in memory in one call, and holds the
# GIL meanwhile.


def safetensors_parts(tensors: Mapping[str, Any], line: int = 8) -> Iterator[bytes | memoryview]:
    """The header of a file with tensors in this order, then the bytes of each tensor.

    Args:
        tensors: The tensors by name, on the CPU.
        line: The header ends at a multiple of this number of bytes.
    """
    dtypes = {
        **{torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"},
        **{torch.int8: "I8", torch.uint8: "U8"},
    }
    header, end = dict[str, Any](__metadata__={"format": "pt"}), 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entry = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % line)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
