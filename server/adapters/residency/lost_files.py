"""What is said of a registered adapter whose files are no longer those that were registered."""

from __future__ import annotations

import logging

from turret.server.adapters.source import Source
from turret.server.errors import AdapterChangedError, AdapterCheckpointError
from turret.server.words import say

_log = logging.getLogger(__name__)


def changed(name: str, source: Source, digest: str, found: str) -> AdapterChangedError:
    """The error for files that were replaced by others.

    Args:
        name: The adapter's name.
        source: Where they are.
        digest: Digest of the registered files.
        found: Digest of the files that are there now.
    """
    facts = {"adapter": name, "path": source.shown, "digest": digest}
    return AdapterChangedError(say("FILES_CHANGED", **facts, found_digest=found))


def lost(name: str, source: Source, error: AdapterCheckpointError) -> AdapterChangedError:
    """The error for files that are gone or broken.

    The reason is only logged, because it shows the server's directories.

    Args:
        name: The adapter's name.
        source: Where they were.
        error: The error from reading them; returned unchanged if it is this error already.
    """
    if isinstance(error, AdapterChangedError):
        return error
    _log.warning("adapter %r cannot be read again: %s", name, error)
    return AdapterChangedError(say("FILES_LOST", adapter=name, path=source.shown))
