"""The Hugging Face hub: its repositories, and the copies of their files on this machine."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from turret.server import log
from turret.server.basics.names import HubId
from turret.server.errors import HubError, HubUnavailableError
from turret.server.words import say

# Conversion of huggingface_hub's errors to the server's errors.


def refusal(hub_id: HubId, error: Exception) -> HubError | HubUnavailableError:
    """The error to raise for an error of ``huggingface_hub``, ``httpx2`` or the system."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    about = {
        "repository": str(hub_id),
        "name": hub_id.repository,
        "hub": without_password(constants.ENDPOINT),
    }
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnavailableError(say("HUB_OFFLINE", folder=constants.HF_HUB_CACHE, **about))
    # Check for this class first, because it is a subclass of RepositoryNotFoundError.
    if isinstance(error, GatedRepoError):
        return HubError.of(say("HUB_GATED", **about))
    if isinstance(error, DisabledRepoError):
        return HubError.of(say("HUB_DISABLED", **about))
    if isinstance(error, RevisionNotFoundError):
        return HubError.of(say("HUB_NO_REVISION", revision=hub_id.revision, **about))
    if isinstance(error, RemoteEntryNotFoundError):
        return HubError.of(say("HUB_FILE_GONE", **about))
    if isinstance(error, RepositoryNotFoundError):
        return HubError.of(say("HUB_NO_REPOSITORY", **about))
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return HubError.of(say("HUB_FORBIDDEN", status=status, **about))
        text = say("HUB_STATUS", status=status, **about)
        is_final = status < 500 and status not in (408, 429)
        return HubError.of(text) if is_final else HubUnavailableError(text)
    problem = f"{type(error).__name__}: {error!s:.200}"
    return HubUnavailableError(say("HUB_NOT_REACHED", problem=problem, **about))


def without_password(url: str) -> str:
    """A mirror's address without user name and password, because clients may see it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


# The content of a repository on the hub, at one commit.
#
# All requests go through ``huggingface_hub``, so its settings apply: ``HF_ENDPOINT``, ``HF_HOME``,
# ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and the token that ``hf auth login`` saves.


_log = logging.getLogger(__name__)

# Timeout of one request to the hub.
ASK_SECONDS = 10.0
MAIN = "main"


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at a commit.

    Attributes:
        id: The repository's id, with the commit as its revision.
        files: Sizes in bytes by name; only cached files if ``is_cached``.
        is_cached: Whether only the cache was read, because the hub does not answer or is offline.
    """

    id: HubId
    files: Mapping[str, int]
    is_cached: bool = False

    @property
    def commit(self) -> str:
        assert self.id.revision is not None
        return self.id.revision


def cache_dir() -> Path:
    """The directory of the hub's cache on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def find_repository(hub_id: HubId, *, may_be_old: bool) -> Repository:
    """Ask the hub for a repository and the current commit of the revision.

    Args:
        hub_id: The repository and the revision.
        may_be_old: Whether to use the last known commit from the cache if the hub does not answer.
            With ``HF_HUB_OFFLINE``, the cache is always used.

    Raises:
        HubError: The repository or revision does not exist, or this machine's token gives no
            access.
        HubUnavailableError: The hub does not answer, and the cache has nothing.
    """
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(
            hub_id.repository, revision=hub_id.revision, files_metadata=True, timeout=ASK_SECONDS
        )
    except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled, OSError) as error:
        refused = refusal(hub_id, error)
        if not isinstance(refused, HubUnavailableError):
            raise refused from None
        is_offline = isinstance(error, OfflineModeIsEnabled)
        cached = cached_repository(hub_id) if may_be_old or is_offline else None
        if cached is None:
            raise refused from None
        if not is_offline:
            _log.warning(
                "the hub cannot be reached; using the files in the cache",
                extra=log.fields(repository=cached.id, reason=refused.message),
            )
        return cached
    if info.sha is None or not hub_id.at(info.sha).is_commit:
        hub = without_password(constants.ENDPOINT)
        raise HubError.of(say("HUB_NO_COMMIT", hub=hub, repository=hub_id))
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    _remember(hub_id, info.sha)
    return Repository(hub_id.at(info.sha), files)


def _ref(hub_id: HubId) -> Path:
    return cache_dir() / hub_id.folder / "refs" / (hub_id.revision or MAIN)


def _remember(hub_id: HubId, commit: str) -> None:
    """Record a revision's commit as ``huggingface_hub`` does, for when the hub is unavailable."""
    if hub_id.is_commit:
        return
    ref = _ref(hub_id)
    beside = ref.with_name(f".{ref.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(commit)
        beside.replace(ref)
    except OSError as error:
        # A read-only cache is still useful, so do not fail.
        _log.debug("cannot record a revision", extra=log.fields(repository=hub_id, reason=error))


def cached_repository(hub_id: HubId) -> Repository | None:
    """The cached repository, at the revision's last known commit; None if it is not cached."""
    if not hub_id.is_commit:
        try:
            hub_id = hub_id.at(_ref(hub_id).read_text().strip())
        except (OSError, UnicodeDecodeError):
            return None
        if not hub_id.is_commit:
            return None
    folder = cache_dir() / hub_id.snapshot
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return Repository(hub_id, files, is_cached=True) if files else None


# Download of a repository's files to the hub's cache.


# Called with the number of bytes received since the last call, which is negative if a file is
# fetched again. An exception ends the download.
OnBytes = Callable[[int], None]


def download(repository: Repository, names: Iterable[str], on_bytes: OnBytes) -> Path:
    """Fetch files that the cache does not have yet.

    ``huggingface_hub`` resumes a download after a lost connection, at most five times in a row
    without a new byte. It writes each file under another name and then moves it to its place, so
    every file in the cache is complete.

    Args:
        repository: The repository, at a commit.
        names: The names of its files to fetch.
        on_bytes: Called with the number of new bytes. Files that are already in the cache have
            none.

    Returns:
        The folder of the commit's files.

    Raises:
        HubError: This machine can no longer access the repository or one of its files.
        HubUnavailableError: The hub does not answer, or its data differs from what it announced.
    """
    hub_id = repository.id
    for name in names:
        counted = 0

        def count(more: int, name: str = name, size: int = repository.files[name]) -> None:
            nonlocal counted
            counted += more
            # A hub may not list sizes.
            if 0 < size < counted:
                raise HubUnavailableError(say("HUB_SENT_TOO_MUCH", path=f"{hub_id}/{name}"))
            on_bytes(more)

        try:
            _fetch(hub_id, name, count)
        except (RuntimeError, ValueError) as error:
            from huggingface_hub import constants

            # The Xet storage is a separate server, which mirrors and firewalls may block. The hub
            # serves the same files over plain HTTP.
            _log.warning(
                "the hub's Xet storage cannot be read; downloading over plain HTTP from now on",
                extra=log.fields(repository=hub_id, file=name, reason=error),
            )
            constants.HF_HUB_DISABLE_XET = True
            on_bytes(-counted)
            counted = 0
            _fetch(hub_id, name, count)
    return cache_dir() / hub_id.snapshot


def _fetch(hub_id: HubId, name: str, on_bytes: OnBytes) -> None:
    import httpx2
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        hf_hub_download(
            hub_id.repository,
            name,
            revision=hub_id.revision,
            etag_timeout=ASK_SECONDS,
            tqdm_class=_bar(on_bytes),
        )
    except LocalEntryNotFoundError as error:
        cause = error.__cause__
        raise refusal(hub_id, cause if isinstance(cause, Exception) else error) from None
    except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled) as error:
        raise refusal(hub_id, error) from None
    except OSError as error:
        if error.errno is not None:
            raise
        # The bytes that arrived differ from what the hub announced.
        text = say("HUB_FILE_INCOMPLETE", file=name, repository=hub_id, problem=error)
        raise HubUnavailableError(text) from None


def _bar(on_bytes: OnBytes) -> Any:
    """The class that ``huggingface_hub`` uses for its progress bars; it calls ``on_bytes``."""
    from tqdm import tqdm

    class Bar(tqdm):
        """Counts bytes written to disk, which are reported in smaller steps than traffic."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> None:
            on_bytes(int(n or 0))

        def ignore(self, *args: object, **kwargs: object) -> None:
            pass

        update_transfer = set_transfer_postfix_str = ignore

    return Bar
