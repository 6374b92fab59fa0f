"""What a repository on the hub holds, at one commit.

``huggingface_hub`` does the talking, so its variables are honoured: ``HF_ENDPOINT``, ``HF_HOME``,
``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and the token that ``hf auth login`` keeps.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from turret.server import log
from turret.server.basics.hub_id import HubId
from turret.server.errors import HubError, HubUnavailableError
from turret.server.hub.faults import refusal, without_password
from turret.server.words import say

_log = logging.getLogger(__name__)

# Timeout of one request to the hub.
ASK_SECONDS = 10.0
MAIN = "main"


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at a commit.

    Attributes:
        id: With the commit as its revision.
        files: Size in bytes by name; of the cache alone if ``is_cached``.
        is_cached: Whether the hub was not asked: it is offline, or away.
    """

    id: HubId
    files: Mapping[str, int]
    is_cached: bool = False

    @property
    def commit(self) -> str:
        assert self.id.revision is not None
        return self.id.revision


def cache_dir() -> Path:
    """Where the hub's files are kept on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def find_repository(hub_id: HubId, *, may_be_old: bool) -> Repository:
    """Ask the hub for a repository, and which commit a revision is now.

    Args:
        hub_id: The repository and the revision.
        may_be_old: Where the hub does not answer, take the commit in the cache that the revision
            was when it was last asked; ``HF_HUB_OFFLINE`` asks for that in any case.

    Raises:
        HubError: There is no such repository or revision, or not for this machine's token.
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
                "the hub cannot be asked; the cache's files are used",
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
        # A read-only cache is still useful.
        _log.debug("cannot note a revision", extra=log.fields(repository=hub_id, reason=error))


def cached_repository(hub_id: HubId) -> Repository | None:
    """The repository from the cache, at the commit that the revision last had."""
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
