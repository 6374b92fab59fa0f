"""Turns the errors of huggingface_hub into errors of the server."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

from turret.server.basics.hub_id import HubId
from turret.server.errors import HubError, HubUnavailableError
from turret.server.words import say


def refusal(hub_id: HubId, error: Exception) -> HubError | HubUnavailableError:
    """The error to raise for one of ``huggingface_hub``, ``httpx2`` or the system."""
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
    # Check for this class first: it is a subclass of RepositoryNotFoundError.
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
    """A mirror's address without the user name and password, as clients may see it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
