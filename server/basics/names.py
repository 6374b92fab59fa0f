"""Names of adapters and hub repositories, and small parts of messages that mention names."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from turret.closest import closest as closest
from turret.server.words import Text, say

# Names of adapters.

# Name of the base model over HTTP, in addition to its own name.
BASE = "base"
# Adapter names that RPCs and --preload accept. They are compared exactly, so parts that a client or
# proxy might remove from a path (``a//b``, ``a/./b``, ``a/../b``) are not allowed.
ADAPTER_NAME = re.compile(
    r"(?![A-Za-z0-9._/-]*/\.{0,2}/)[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?"
)
# Names of the adapters of samplers: training/<session>/…. Only the client that trains knows them.
_PRIVATE = re.compile(r"training/[0-9a-f]{32}/.+")
_SHOWN_CHARS = 40


def is_private(name: str) -> bool:
    """Whether an adapter's name must not be disclosed, because everyone who knows it may use it."""
    return _PRIVATE.fullmatch(name) is not None


def no_adapter_name(name: str) -> Text | None:
    """The reason why a name is invalid for an adapter, or None."""
    if ADAPTER_NAME.fullmatch(name):
        return None
    shown = name if len(name) <= _SHOWN_CHARS else f"{name[:_SHOWN_CHARS]}..."
    return say("NOT_AN_ADAPTER_NAME", value=shown)


# Paths of adapters in S3 buckets and OCI registries.

S3_SCHEME, OCI_SCHEME = "s3://", "oci://"
_REMOTE = re.compile(r"(s3|oci)://[A-Za-z0-9[][A-Za-z0-9._:@/+=\[\]-]{0,1000}")


def is_remote(path: str) -> bool:
    """Whether a path names an adapter in a bucket or a registry."""
    return path.startswith((S3_SCHEME, OCI_SCHEME))


def is_remote_path(path: str) -> bool:
    """Whether a path has the form of a remote adapter's, or of a prefix of such paths."""
    parts = path.rstrip("/").split("/")[2:]
    return _REMOTE.fullmatch(path) is not None and not {"", ".", ".."} & set(parts)


def is_below_remote(path: str, prefix: str) -> bool:
    """Whether a remote path is the prefix, or below it.

    A prefix ends at a slash. The prefix of an OCI repository also ends before a tag or digest, but
    the prefix of a host does not end before a port.
    """
    prefix = prefix.rstrip("/")
    if not is_remote_path(path) or not path.startswith(prefix):
        return False
    is_repository = prefix.startswith(OCI_SCHEME) and "/" in prefix.removeprefix(OCI_SCHEME)
    return path[len(prefix) : len(prefix) + 1] in ("", "/", *(":@" if is_repository else ""))


# Names of repositories on a Hugging Face hub: ``org/name``, or ``org/name@revision``.

# Prefix of an adapter path that names a hub repository.
HUB_SCHEME = "hub:"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,95})"
_ID = re.compile(rf"({_PART})/({_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/+-]{{0,254}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def not_a_hub_id(text: str) -> Text:
    """The error for a text that is not the id of a repository."""
    return say("NOT_A_HUB_ID", value=text[:200])


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository, and one of its revisions.

    Attributes:
        org: The organisation or user.
        name: The name of the repository.
        revision: A branch, a tag or a commit; None means the main branch.
    """

    org: str
    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId:
        """Read ``org/name`` or ``org/name@revision``.

        Raises:
            ValueError: The text has neither form.
        """
        match = _ID.fullmatch(text)
        # The hub forbids ``..`` and ``--``: its cache separates parts of a directory name with two
        # dashes.
        if match is None or ".." in text or "--" in text.partition("@")[0]:
            raise ValueError(not_a_hub_id(text))
        return cls(*match.groups())

    @classmethod
    def find(cls, text: str) -> HubId | None:
        """Like ``parse``, but returns None for any other text."""
        try:
            return cls.parse(text)
        except ValueError:
            return None

    @property
    def repository(self) -> str:
        """``org/name``."""
        return f"{self.org}/{self.name}"

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def folder(self) -> str:
        """The repository's folder in the hub's cache."""
        return f"models--{self.org}--{self.name}"

    @property
    def snapshot(self) -> str:
        """The folder of a commit in the cache."""
        assert self.is_commit, "only a commit has a folder of files"
        return f"{self.folder}/snapshots/{self.revision}"

    def at(self, commit: str) -> HubId:
        """The same repository at a commit."""
        return replace(self, revision=commit)

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def model_place(written: str, folder: Path = Path()) -> Path:
    """The path of a model given by a user; for a model on the hub, the path equals its id.

    A text in the form of an id stays unchanged. A missing path that would look like an id after it
    is joined with a folder, or without its ``./``, becomes absolute, so that it cannot name a
    stranger's repository.

    Args:
        written: The text as it was typed.
        folder: The directory to which a path is relative.
    """
    path = folder / written
    try:
        is_there = path.exists()
    except OSError:
        # The directory above is not accessible to this user; reading the path reports that.
        is_there = True
    if is_there:
        return path
    if HubId.find(written):
        return Path(written)
    return path.absolute() if HubId.find(str(path)) else path


# Maximum number of directory entries to compare.
_MOST_NAMES = 4096


def closest_path(path: Path, is_meant: Callable[[Path], bool]) -> str | None:
    """The closest entry of a missing path's directory, among those that ``is_meant`` accepts."""
    try:
        beside = list(islice(path.absolute().parent.iterdir(), _MOST_NAMES))
        close = closest(path.name, [each.name for each in beside if is_meant(each)])
    except OSError:
        return None
    return None if close is None else str(path.with_name(close))


# The command that installs an optional extra of the package.


def how_to_add(extra: str) -> str:
    """The command that installs an extra with this Python, because others may lack turret."""
    return f"`{shlex.quote(sys.executable)} -m pip install 'turret[{extra}]'` adds it"
