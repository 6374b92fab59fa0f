"""The one directory adapters are loaded from, and the only way to open a file below it."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from turret.server.errors import AdapterCheckpointError

MAX_PATH_CHARS = 1024


def _refuse(path: str, why: str) -> AdapterCheckpointError:
    shown = path if len(path) <= MAX_PATH_CHARS else path[:64] + "…"
    return AdapterCheckpointError(
        f"path {shown!r} {why}", metadata={"path": shown}, violations=[("path", why)]
    )


class AdapterRoot:
    """An allow-listed directory. Symbolic links may be used below it, but not to leave it.

    Without a directory (None) nothing can be loaded.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = None if root is None else root.resolve()

    def directory(self, path: str) -> Path:
        """Resolves ``path``, relative to the root, to an existing directory inside it.

        Raises:
            AdapterCheckpointError: Empty, absolute, with ``..`` or control characters, leading
                out of the root through a link, or not a directory.
        """
        if not path or len(path) > MAX_PATH_CHARS:
            raise _refuse(path, f"must have 1 to {MAX_PATH_CHARS} characters")
        if any(ord(char) < 32 or char in "\\\x7f" for char in path):
            raise _refuse(path, "must not contain control characters or backslashes")
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts:
            raise _refuse(path, "must be relative to the adapter root and stay inside it")
        if self._root is None:
            raise _refuse(path, "cannot be loaded: the server was started without --adapter-root")
        try:
            resolved = (self._root / pure).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):  # RuntimeError: a loop of links, before 3.13
            raise _refuse(path, "does not exist under the adapter root") from None
        if not resolved.is_relative_to(self._root):
            raise _refuse(path, "leaves the adapter root through a symbolic link")
        if not resolved.is_dir():
            raise _refuse(path, "is not a directory")
        return resolved

    def open_file(self, directory: Path, name: str, path: str) -> BinaryIO:
        """Opens a regular file of a resolved directory for reading.

        A link to a file elsewhere *inside* the root is followed (Hugging Face caches use them).

        Raises:
            AdapterCheckpointError: Missing, outside the root, or not a regular file.
        """
        shown = f"{path}/{name}"
        assert self._root is not None, "the directory was resolved below it"
        try:
            resolved = (directory / name).resolve(strict=True)
        except (OSError, RuntimeError):
            raise _refuse(shown, "does not exist") from None
        if not resolved.is_relative_to(self._root):
            raise _refuse(shown, "leaves the adapter root through a symbolic link")
        # NOFOLLOW closes the gap between resolving and opening; NONBLOCK keeps a FIFO from hanging.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(resolved, flags)
        except OSError as error:
            raise _refuse(shown, f"cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _refuse(shown, "is not a regular file")
        return os.fdopen(descriptor, "rb")
