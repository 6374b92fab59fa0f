"""Adapters on the hub: which of them may be had, and their files in the cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from turret.server.adapters.checkpoint.adapter_root import refuse
from turret.server.adapters.checkpoint.no_adapter import refuse_missing_tensors
from turret.server.adapters.source import (
    CONFIG_FILE,
    PROVENANCE_FILE,
    TEMPLATE_FILES,
    TENSORS_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
)
from turret.server.basics.files import reporting_disk_faults
from turret.server.basics.hub_id import HUB_SCHEME, HubId, not_a_hub_id
from turret.server.errors import (
    BudgetExceededError,
    HubUnavailableError,
    QueueFullError,
)
from turret.server.hub.download import download
from turret.server.hub.repository import Repository, cache_dir, find_repository
from turret.server.words import say

# Value of --adapter-hub that allows every organisation.
ANY = "*"
# Concurrent downloads; each may use the whole disk budget.
MAX_DOWNLOADS = 8
# Timeout of a download: a fixed part plus its bytes at the speed of a slow line.
LEAST_SECONDS = 60.0
LEAST_BYTES_PER_SECOND = 1 << 20
_NEEDED = (CONFIG_FILE, TENSORS_FILE)


class _Stopped(Exception):
    """Raised to end a download from within."""


class AdapterHub:
    """Resolves paths that begin with ``hub:``. Safe to use from several threads.

    Args:
        allowed: Organisations and users whose adapters may be had; ``*`` is all of them, and
            nothing is none.
        max_bytes: Most bytes of one adapter's files.
    """

    def __init__(self, allowed: Sequence[str] = (), max_bytes: int = 0) -> None:
        self._allowed = frozenset(allowed)
        self._max_bytes = max_bytes
        self._places = threading.BoundedSemaphore(MAX_DOWNLOADS)

    @property
    def root(self) -> Path | None:
        """The folder of the files; None if no adapter from the hub is allowed."""
        return cache_dir() if self._allowed else None

    def fetch(self, path: str) -> str:
        """Have an adapter's files in the cache.

        Nothing is asked of the hub for a commit whose files are there. Blocks for as long as a
        download may take, and no longer.

        Args:
            path: ``hub:org/name`` or ``hub:org/name@revision``.

        Returns:
            The same path with the commit as its revision.

        Raises:
            AdapterCheckpointError: Not such a path, an organisation that is not allowed, or no
                adapter.
            HubError: There is no such repository or revision, or not for this machine's token.
            HubUnavailableError: The hub does not answer, or too slowly.
            BudgetExceededError: Too large.
            StorageFullError, StorageFailedError: The disk of the cache takes nothing.
            QueueFullError: ``MAX_DOWNLOADS`` are under way.
        """
        repository = self.check(path)
        if repository is None:
            return path
        names = _names(path, repository.files)
        if not _is_there(repository.id, names):
            size = sum(repository.files[name] for name in names)
            self._download(path, repository, names, size)
        return f"{HUB_SCHEME}{repository.id}"

    def check(self, path: str) -> Repository | None:
        """Refuse what ``fetch`` would refuse, before any weights are downloaded.

        Args:
            path: See ``fetch``.

        Returns:
            The repository; None for a commit whose files are there, of which nobody is asked.

        Raises:
            See ``fetch``.
        """
        hub_id = self._checked(path)
        if hub_id.is_commit and _is_there(hub_id):
            return None
        # A branch may have moved since it was cached.
        repository = find_repository(hub_id, may_be_old=False)
        names = _names(path, repository.files)
        if not _is_there(repository.id, names):
            self._check_size(path, sum(repository.files[name] for name in names))
        return repository

    def find(self, path: str, repository: Repository | None) -> str | None:
        """The files of ``path`` below ``root``, if the cache has them; the hub is not asked.

        Args:
            path: One that ``check`` took.
            repository: What it returned.
        """
        hub_id = self._checked(path) if repository is None else repository.id
        return hub_id.snapshot if hub_id.is_commit and _is_there(hub_id) else None

    def fetch_tokenizer(self, path: str) -> None:
        """Have the tokenizer beside an adapter's files in the cache, if there is one.

        Args:
            path: As ``fetch`` gave it.

        Raises:
            See ``fetch``.
        """
        hub_id = self._checked(path)
        if (cache_dir() / hub_id.snapshot / TOKENIZER_FILE).is_file():
            return
        repository = find_repository(hub_id, may_be_old=True)
        if TOKENIZER_FILE not in repository.files:
            return
        # Fetch the largest file last: if it is in the cache, all of them are.
        names = [name for name in TOKENIZER_FILES if name in repository.files][::-1]
        size = sum(repository.files[name] for name in names)
        self._check_size(path, size)
        self._download(path, repository, names, size)

    def _check_size(self, path: str, size: int) -> None:
        if size > self._max_bytes:
            most = self._max_bytes
            raise BudgetExceededError(
                say("UPLOAD_TOO_LARGE", path=path, bytes=size, max_upload_bytes=most)
            )

    def _checked(self, path: str) -> HubId:
        if not self._allowed:
            raise refuse(path, say("HUB_NOT_ALLOWED"))
        name = path.removeprefix(HUB_SCHEME)
        hub_id = HubId.find(name)
        if hub_id is None:
            raise refuse(path, not_a_hub_id(name))
        if self._allowed.isdisjoint((ANY, hub_id.org)):
            choices = ", ".join(sorted(self._allowed))
            raise refuse(
                path,
                say("HUB_ORGANISATION_NOT_ALLOWED", organisation=hub_id.org, choices=choices),
            )
        return hub_id

    def _download(self, path: str, repository: Repository, names: Sequence[str], size: int) -> None:
        if not self._places.acquire(blocking=False):
            raise QueueFullError(say("TOO_MANY_DOWNLOADS", most=MAX_DOWNLOADS))
        seconds = LEAST_SECONDS + size / LEAST_BYTES_PER_SECOND
        ends_at = time.monotonic() + seconds
        left, failures = size, []

        def on_bytes(count: int) -> None:
            nonlocal left
            left -= count
            if left < 0 or time.monotonic() > ends_at:
                raise _Stopped

        def work() -> None:
            try:
                with reporting_disk_faults():
                    download(repository, names, on_bytes)
            except BaseException as error:
                failures.append(error)
            finally:
                self._places.release()

        # The library may hang where no exception can stop it. On a thread of its own, only the
        # caller gives up, and the place stays taken until the library does.
        thread = threading.Thread(target=work, name=f"download {repository.id}", daemon=True)
        thread.start()
        thread.join(seconds)
        if left < 0:
            raise HubUnavailableError(say("HUB_SENT_TOO_MUCH", path=path))
        if thread.is_alive() or (failures and isinstance(failures[0], _Stopped)):
            name = repository.id.repository
            found = size - left
            raise HubUnavailableError(
                say("HUB_TOO_SLOW", path=path, found=found, needed=size, seconds=seconds, name=name)
            )
        if failures:
            raise failures[0]


def _is_there(hub_id: HubId, names: Sequence[str] = _NEEDED) -> bool:
    folder = cache_dir() / hub_id.snapshot
    return all((folder / name).is_file() for name in names)


def _names(path: str, files: Mapping[str, int]) -> list[str]:
    """The files to fetch.

    Raises:
        AdapterCheckpointError: The config or the tensors of an adapter are missing.
    """
    below = sorted(name for name in files if name.endswith(f"/{CONFIG_FILE}"))
    if CONFIG_FILE not in files and below:
        raise refuse(path, say("ADAPTER_BELOW_TOP", folder=below[0].rpartition("/")[0]))
    if CONFIG_FILE not in files:
        raise refuse(path, say("NOT_AN_ADAPTER"))
    if TENSORS_FILE not in files:
        refuse_missing_tensors(path, sorted(name for name in files if "/" not in name))
    # Fetch the tensors last: if they are in the cache, the other files are too.
    return [name for name in (PROVENANCE_FILE, *TEMPLATE_FILES, *_NEEDED) if name in files]
