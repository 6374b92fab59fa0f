"""Names of repositories on a Hugging Face hub: ``org/name``, or ``org/name@revision``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

# What an adapter's path begins with where it is one.
HUB_SCHEME = "hub:"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,95})"
_ID = re.compile(rf"({_PART})/({_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/+-]{{0,254}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository, and which state of it.

    Attributes:
        org: The organisation or the user.
        name: Of the repository.
        revision: A branch, a tag or a commit; None is the main branch.
    """

    org: str
    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId:
        """Read ``org/name`` or ``org/name@revision``.

        Raises:
            ValueError: It is neither.
        """
        match = _ID.fullmatch(text)
        # As the hub itself has it: the cache's folders are named with two dashes between parts.
        if match is None or ".." in text or "--" in text.partition("@")[0]:
            raise ValueError(f"{text!r:.200} is not org/name or org/name@revision")
        return cls(*match.groups())

    @classmethod
    def find(cls, text: str) -> HubId | None:
        """As ``parse``, but None for anything else."""
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
        """A commit's folder in the hub's cache, from the cache's own."""
        assert self.is_commit, "only a commit has a folder of files"
        return f"{self.folder}/snapshots/{self.revision}"

    def at(self, commit: str) -> HubId:
        """The same repository at a commit."""
        return replace(self, revision=commit)

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"
