"""Files of a repository, into the hub's cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from turret.server import log
from turret.server.basics.hub_id import HubId
from turret.server.errors import HubUnavailableError
from turret.server.hub.faults import refusal
from turret.server.hub.repository import ASK_SECONDS, Repository, cache_dir
from turret.server.words import say

_log = logging.getLogger(__name__)

# Called with the bytes received since the last call, negative if a file is fetched again. An
# exception from it ends the download.
OnBytes = Callable[[int], None]


def download(repository: Repository, names: Iterable[str], on_bytes: OnBytes) -> Path:
    """Fetch files that the cache does not have yet.

    A connection that breaks is taken up where it broke, five times without a byte at most
    (``huggingface_hub`` sees to that). Each file is written beside its place and moved there, so
    what lies in the cache is whole.

    Args:
        repository: At a commit.
        names: Of its files.
        on_bytes: Told of progress; files that are there already make none.

    Returns:
        The folder of the commit's files.

    Raises:
        HubError: The repository, or a file of it, is no longer there for this machine.
        HubUnavailableError: The hub does not answer, or not with what it announced.
    """
    hub_id = repository.id
    for name in names:
        counted = 0

        def count(more: int) -> None:
            nonlocal counted
            counted += more
            on_bytes(more)

        try:
            _fetch(hub_id, name, count)
        except (RuntimeError, ValueError) as error:
            from huggingface_hub import constants

            # The Xet storage is a separate server, which mirrors and firewalls may not know. The
            # hub serves the same files over plain HTTP.
            _log.warning(
                "files come over plain HTTP from now on: the hub's Xet storage cannot be read",
                extra=log.fields(repository=hub_id, file=name, reason=error),
            )
            constants.HF_HUB_DISABLE_XET = True
            on_bytes(-counted)
            _fetch(hub_id, name, on_bytes)
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
    """The class that ``huggingface_hub`` takes for its progress bars."""

    class Bar:
        """Counts bytes written to disk, which are reported in finer steps than network traffic."""

        total: int | None = None

        def __init__(self, *args: object, **kwargs: object) -> None:
            pass

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            on_bytes(int(n or 0))

        def ignore(self, *args: object, **kwargs: object) -> None:
            pass

        update_transfer = set_postfix_str = set_transfer_postfix_str = ignore
        close = refresh = ignore

    return Bar
