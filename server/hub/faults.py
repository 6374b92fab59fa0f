"""Turns the errors of huggingface_hub into messages with a next step."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

from turret.server.basics.hub_id import HubId
from turret.server.errors import HubError, HubUnavailableError

_TOKEN = "set HF_TOKEN or run hf auth login"


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

    where, name = _without_password(constants.ENDPOINT), hub_id.repository
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnavailableError(
            f"{hub_id} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE keeps it"
            f" from being fetched; unset it, or bring the files there with hf download {name}"
        )
    # Check for this class first: it is a subclass of RepositoryNotFoundError.
    if isinstance(error, GatedRepoError):
        return HubError.about(
            hub_id, f"{name} is gated: accept its terms at {where}/{name}, then {_TOKEN}"
        )
    if isinstance(error, DisabledRepoError):
        return HubError.about(hub_id, f"{name} was disabled by {where}")
    if isinstance(error, RevisionNotFoundError):
        return HubError.about(
            hub_id, f"{name} has no revision {hub_id.revision!r}; see {where}/{name}"
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return HubError.about(hub_id, f"{hub_id} lacks a file that it lists; see {where}/{name}")
    if isinstance(error, RepositoryNotFoundError):
        return HubError.about(
            hub_id,
            f"{where} has no model {name!r} that this machine may see; check its spelling, and if"
            f" it is private, {_TOKEN}",
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return HubError.about(
                hub_id, f"{where} refuses {name} to this machine's token ({status}); {_TOKEN}"
            )
        if status < 500 and status not in (408, 429):
            return HubError.about(hub_id, f"{where} answered {status} when asked for {hub_id}")
        return HubUnavailableError(f"{where} answered {status} when asked for {hub_id}")
    return HubUnavailableError(
        f"{where} cannot be reached for {hub_id} ({type(error).__name__}: {error!s:.200}); check"
        " the network, HF_ENDPOINT and the proxy's variables"
    )


def _without_password(url: str) -> str:
    """A mirror's address without the user name and password, as clients may see it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
