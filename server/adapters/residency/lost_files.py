"""What is said of a registered adapter whose files are no longer those that were registered."""

from __future__ import annotations

import logging

from turret.server.adapters.source import Source
from turret.server.errors import AdapterChangedError, AdapterCheckpointError

_log = logging.getLogger(__name__)


def changed(name: str, source: Source, digest: str, found: str) -> AdapterChangedError:
    """There are others in their place.

    Args:
        name: Of the adapter.
        source: Where they are.
        digest: Of those that were registered.
        found: Of those that are there.
    """
    return AdapterChangedError(
        f"adapter {name!r} changed on disk since it was loaded{_from(source)}; replace"
        " the adapter to serve the new files",
        metadata={"adapter": name, "path": source.shown, "digest": digest, "found_digest": found},
    )


def lost(name: str, source: Source, error: AdapterCheckpointError) -> AdapterChangedError:
    """They are gone, or broken.

    Who only asks is told by the adapter's name, and nothing of the server's directories: why they
    cannot be read is logged.

    Args:
        name: Of the adapter.
        source: Where they were.
        error: What reading them raised; itself, if it says this already.
    """
    if isinstance(error, AdapterChangedError):
        return error
    _log.warning("adapter %r cannot be read again: %s", name, error)
    return AdapterChangedError(
        f"adapter {name!r}: its files are gone{_from(source)}, or broken; put them back,"
        " or replace or unload the adapter",
        metadata={"adapter": name, "path": source.shown},
    )


def _from(source: Source) -> str:
    """Where an adapter's files are, unless the server keeps them itself."""
    return "" if source.is_upload else f" from {source.path!r}"
