"""The one directory from which adapters are loaded, and the only way to open a file below it.

Paths are walked one name at a time. Each name is opened relative to the directory before it and
never through a link: a link is read, and its text is walked in turn. An attacker who replaces a
directory with a link during the walk therefore gains nothing over a link that was there before, and
no path is checked by one lookup and opened by another. (``openat2`` with RESOLVE_BENEATH would
reject absolute links to places inside the root, which Hugging Face caches and users create.)
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import pwd
import re
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Self

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE
from turret.server.adapters.checkpoint import Findings
from turret.server.basics.names import closest
from turret.server.basics.work import is_out_of_memory
from turret.server.errors import AdapterCheckpointError, StorageFailedError
from turret.server.words import Text, say

# A cache of file digests, so that an unchanged adapter is not hashed again.
#
# A file is identified by its device, inode, size, mtime and ctime. Every write call advances
# the ctime, which no program can set back. A write through a memory mapping may not advance the
# ctime, so the cache holds only files that nobody else can open for writing. A file that changed
# just before it was read is not cached: a second change within the same tick would go unnoticed.


# Seconds that a file must have been unchanged before it was read; some network file systems keep
# times in whole seconds.
_SETTLED_SECONDS = 3.0
_MAX_ENTRIES = 1 << 16


def stamp_of(*descriptors: int) -> bytes | None:
    """Identifies the present state of open files in 16 bytes; None if one changed just now."""
    stats = []
    for descriptor in descriptors:
        s = os.fstat(descriptor)
        # This also rejects times in the future, which mean that a clock is wrong.
        if not 0 <= s.st_ctime <= time.time() - _SETTLED_SECONDS:
            return None
        stats.append((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
    return hashlib.blake2b(repr(stats).encode(), digest_size=16).digest()


class DigestCache:
    """Digests by stamp; keeps the ``max_entries`` used most recently. Thread-safe."""

    def __init__(self, max_entries: int = _MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._digests: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, stamp: bytes | None) -> str | None:
        """The digest of files with this stamp, if it is known."""
        with self._lock:
            if stamp not in self._digests:
                return None
            self._digests.move_to_end(stamp)
            return self._digests[stamp]

    def remember(self, stamp: bytes | None, digest: str) -> None:
        """Keeps the digest of files; call it with a stamp taken before they were read."""
        if stamp is None:
            return
        with self._lock:
            self._digests[stamp] = digest
            self._digests.move_to_end(stamp)
            if len(self._digests) > self._max_entries:
                self._digests.popitem(last=False)


MAX_PATH_CHARS = 1024
# Maximum number of components to walk for one path, links included, so that link loops end.
_MAX_STEPS = 2048
# Levels below a directory to search for adapters; LLaMA-Factory nests them three deep.
_MOST_LEVELS = 3
# Maximum number of directories in this search.
_MOST_SEARCHED = 2000
# Maximum number of names to compare a missing one with, which takes a millisecond or two.
_MOST_COMPARED = 200
# O_PATH does not require permission to list the directory.
_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK keeps the open from hanging on a FIFO.
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.EIO)


def refuse(path: str, why: Text) -> AdapterCheckpointError:
    """The error for a path below the root."""
    shown = path if len(path) <= MAX_PATH_CHARS else path[:64] + "…"
    return AdapterCheckpointError(say("BAD_PATH", path=shown, why=why), violations=[("path", why)])


def _cannot_be_read(error: OSError) -> Text:
    """The reason for the error; for a permission error, with the user who needs read access."""
    if not isinstance(error, PermissionError):
        return say("CANNOT_READ", why=error.strerror)
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = str(os.geteuid())
    return say("READ_FORBIDDEN", user=user)


def _raise_if_exhausted(error: OSError | ValueError) -> None:
    """Raises StorageFailedError or the out-of-memory error if the path is not the cause."""
    if is_out_of_memory(error):
        raise error
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        raise StorageFailedError(say("NO_FILE_OPENS", why=error.strerror)) from None


class AdapterDirectory:
    """An open directory below the root; renaming it later has no effect.

    Use it as a context manager.

    Args:
        root: The root, which links in the directory must not leave.
        descriptor: The directory's descriptor; closed with this object.
        parts: The directory's path below the root, free of links when it was walked.
        path: The directory's path in messages.
    """

    def __init__(self, root: AdapterRoot, descriptor: int, parts: list[str], path: str) -> None:
        self._root = root
        self._descriptor = descriptor
        self._parts = parts
        self._path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        os.close(self._descriptor)

    def has(self, name: str) -> bool:
        """Whether the directory has an entry of this name, including broken links.

        Raises:
            AdapterCheckpointError: The server has no permission to search the directory.
        """
        try:
            os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except PermissionError as error:
            raise refuse(self._path, _cannot_be_read(error)) from None
        except OSError:
            return False
        return True

    def adapter_below(self) -> str | None:
        """The path of a directory below this one that has an adapter's config, if there is one.

        A deeper level counts only if no level above has one. If a level has several, the last one
        counts, in the order of the numbers in their names. Links are not followed.
        """
        found: list[PurePosixPath] = []
        walk = os.fwalk(".", dir_fd=self._descriptor)
        for folder, below, files, _ in itertools.islice(walk, _MOST_SEARCHED):
            path = PurePosixPath(folder)
            if CONFIG_FILE in files:
                found.append(path)
            is_lowest = len(path.parts) == _MOST_LEVELS
            below[:] = [] if is_lowest else [name for name in below if name[0] != "."]
        least = min((len(path.parts) for path in found), default=0)
        nearest = [str(path) for path in found if len(path.parts) == least]
        return str(PurePosixPath(self._path, max(nearest, key=_numbered))) if nearest else None

    def names(self) -> list[str]:
        """Names in the directory, in order. Links are names like any other.

        Raises:
            AdapterCheckpointError: The server has no permission to list the directory.
        """
        try:
            readable = os.open(".", _LISTED, dir_fd=self._descriptor)
        except PermissionError as error:
            raise refuse(self._path, _cannot_be_read(error)) from None
        try:
            return sorted(os.listdir(readable))
        finally:
            os.close(readable)

    def open_file(self, name: str) -> BinaryIO:
        """Opens a regular file of the directory for reading.

        A link to a file elsewhere *inside* the root is followed (Hugging Face caches have them).

        Raises:
            AdapterCheckpointError: The file is missing, outside the root, or not a regular file.
        """
        shown = f"{self._path}/{name}"
        try:
            opened = _open_or_read_link(self._descriptor, name, _FILE)
            if isinstance(opened, str):
                opened, _ = self._root.walk(self._parts, opened, _FILE, shown)
        except FileNotFoundError:
            raise refuse(shown, say("MISSING_FILE")) from None
        except OSError as error:
            _raise_if_exhausted(error)
            is_loop = error.errno == errno.ELOOP
            why = say("MISSING_FILE") if is_loop else _cannot_be_read(error)
            raise refuse(shown, why) from None
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            os.close(opened)
            raise refuse(shown, say("NOT_A_FILE"))
        return os.fdopen(opened, "rb")


class AdapterRoot:
    """An allow-listed directory. Symbolic links may be used below it, but not to leave it.

    Without a directory (None), nothing can be loaded.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = None if root is None else root.resolve()

    def relative(self, path: str) -> str:
        """An absolute path inside the root as a path relative to it; any other path unchanged."""
        if self._root is None or not Path(path).is_relative_to(self._root):
            return path
        return str(Path(path).relative_to(self._root))

    def open_directory(self, path: str, shown: str | None = None) -> AdapterDirectory:
        """Opens ``path``, relative to the root, which must be a directory inside it.

        Args:
            path: The path from the root.
            shown: The name in messages; None for the path itself.

        Raises:
            AdapterCheckpointError: The path is empty or absolute, contains ``..`` or control
                characters, leads out of the root through a link, or is not a directory.
        """
        shown = path if shown is None else shown
        if not path or len(path) > MAX_PATH_CHARS:
            raise refuse(shown, say("PATH_LENGTH", most=MAX_PATH_CHARS, found=len(path)))
        if any(ord(char) < 32 or char in "\\\x7f" for char in path):
            raise refuse(shown, say("PATH_CHARACTERS"))
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts:
            raise refuse(shown, say("PATH_OUTSIDE_ROOT"))
        if self._root is None:
            raise refuse(shown, say("NO_ADAPTER_ROOT"))
        try:
            descriptor, parts = self.walk([], str(pure), _DIRECTORY, shown)
        except NotADirectoryError:
            raise refuse(shown, say("NOT_A_DIRECTORY")) from None
        except (OSError, ValueError) as error:
            _raise_if_exhausted(error)
            if isinstance(error, PermissionError):
                raise refuse(shown, _cannot_be_read(error)) from None
            if shown != path:
                raise refuse(shown, say("MISSING_FILE")) from None
            near = _closest_path(self._root, pure)
            raise refuse(shown, say("NO_SUCH_PATH", root=self._root, closest=near)) from None
        return AdapterDirectory(self, descriptor, parts, shown)

    def walk(self, start: list[str], rest: str, flags: int, shown: str) -> tuple[int, list[str]]:
        """Opens the file or directory that ``rest`` names, relative to the directory ``start``.

        Args:
            start: A directory's path below the root.
            rest: A path or the text of a link: relative, or absolute.
            flags: Flags for opening the last name.
            shown: The whole path, for messages.

        Returns:
            The descriptor, and the path below the root without links, as a list of names.

        Raises:
            AdapterCheckpointError: The path leads out of the root.
            OSError: A name is missing, or the links never end.
        """
        assert self._root is not None
        pending = self._names_below(start, rest, shown)
        walked: list[str] = []
        current = os.open(self._root, _DIRECTORY)
        try:
            for _ in range(_MAX_STEPS):
                if not pending:
                    return os.dup(current), walked
                name = pending.pop(0)
                if name == "..":
                    # Resolve .. by the names walked so far; the system would follow a directory
                    # that was moved meanwhile.
                    if not walked:
                        raise refuse(shown, say("LINK_OUTSIDE_ROOT"))
                    pending[:0] = walked[:-1]
                    opened = os.open(self._root, _DIRECTORY)
                    walked = []
                else:
                    opened = _open_or_read_link(current, name, _DIRECTORY if pending else flags)
                    if isinstance(opened, str):
                        pending[:0] = self._names_below(walked, opened, shown)
                        opened = os.open(self._root, _DIRECTORY)
                        walked = []
                    else:
                        walked.append(name)
                os.close(current)
                current = opened
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        finally:
            os.close(current)

    def _names_below(self, start: list[str], rest: str, shown: str) -> list[str]:
        """The names to walk from the root to the target of ``rest``, seen from ``start``."""
        assert self._root is not None
        if not rest.startswith("/"):
            return [*start, *_names(rest)]
        # This lookup only determines names, which are walked like any others.
        for target in (Path(rest), Path(os.path.realpath(rest))):
            if target.is_relative_to(self._root):
                return _names(str(target.relative_to(self._root)))
        raise refuse(shown, say("LINK_OUTSIDE_ROOT"))


def _closest_path(root: Path, path: PurePosixPath) -> str | None:
    """An existing directory whose path differs slightly from this one, in the first missing name.

    The path may also begin with the name of the root itself. Only names are compared; nothing that
    is found here is opened.
    """
    below = root.joinpath(*path.parts[1:])
    if path.parts[:1] == (root.name,) and below != root and os.path.isdir(below):
        return "/".join(path.parts[1:])
    for number, name in enumerate(path.parts):
        before = root.joinpath(*path.parts[:number])
        if os.path.isdir(before / name):
            continue
        try:
            with os.scandir(before) as entries:
                names = [entry.name for entry in itertools.islice(entries, _MOST_COMPARED)]
        except OSError:
            return None
        near = closest(name, names)
        meant = "/".join((*path.parts[:number], near or name, *path.parts[number + 1 :]))
        return meant if near is not None and os.path.isdir(root / meant) else None
    return None


def _numbered(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


def _open_or_read_link(directory: int, name: str, flags: int) -> int | str:
    """A descriptor of ``name`` in an open directory or, if that is a link, its text."""
    try:
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        try:
            return os.readlink(name, dir_fd=directory)
        except OSError:
            raise error from None


_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Files of the trainer itself, which do not show in which format the weights are saved.
_TRAINERS_OWN = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
_MODEL_CONFIG = "config.json"


def check_is_adapter(directory: AdapterDirectory, path: str) -> None:
    """Reject a directory that lacks one of an adapter's two files.

    Args:
        directory: The directory. The error reports what it contains instead.
        path: The adapter's name in messages.

    Raises:
        AdapterCheckpointError: The directory lacks a file.
    """
    if not directory.has(CONFIG_FILE):
        if _is_model(directory.names()):
            raise refuse(path, say("WHOLE_MODEL"))
        raise refuse(path, say("NOT_AN_ADAPTER", closest=directory.adapter_below()))
    # Pickle files alongside the tensors do no harm, because they are never opened.
    if not directory.has(TENSORS_FILE):
        refuse_missing_tensors(path, directory.names())


def refuse_missing_tensors(path: str, names: Iterable[str]) -> None:
    """Reject an adapter without its tensors. ``names`` are the names of its other files.

    Raises:
        AdapterCheckpointError: Always. The error names a pickle file, if there is one.
    """
    findings = Findings(path)
    for name in names:
        if name.endswith(_PICKLE_SUFFIXES) and not name.startswith(_TRAINERS_OWN):
            findings.add(name, say("PICKLE"))
    if not findings.fields:
        findings.add(TENSORS_FILE, say("MISSING_FILE"))
    findings.raise_if_any()


def _is_model(names: list[str]) -> bool:
    has_weights = any(n.startswith("model") and ".safetensors" in n for n in names)
    is_gguf = any(name.endswith(".gguf") for name in names)
    return is_gguf or (_MODEL_CONFIG in names and has_weights)
