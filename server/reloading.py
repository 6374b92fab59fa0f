"""Tokens that change while the server runs, and the signal that says so."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from turret.server.api.access.tokens import TokenTable
from turret.server.api.access.watched_files import WatchedFiles

# How soon a changed token file is noticed without SIGHUP.
POLL_SECONDS = 5.0
NOTHING_TO_RELOAD = "nothing to read again: no --token-file"


class Hangup:
    """Whether a SIGHUP comes of a terminal that closes, which is to end what runs in it."""

    def __init__(self) -> None:
        self._had_terminal = _has_terminal()

    def is_of_terminal(self) -> bool:
        """Of any other the sender wants files to be read again."""
        return self._had_terminal and not _has_terminal()


def _has_terminal() -> bool:
    # One that has closed is none any more.
    return any(os.isatty(descriptor) for descriptor in (0, 1, 2))


class TokenReloader:
    """Reads a token file again when it has changed; a file that is no good changes nothing.

    Args:
        path: The file.
        tokens: Accepts what was read last.
    """

    def __init__(self, path: Path, tokens: TokenTable) -> None:
        self._files = WatchedFiles((path,), lambda: TokenTable.read(path), "tokens")
        self._tokens = tokens
        self._asked = asyncio.Event()

    def reload(self) -> None:
        """Look at once, changed or not."""
        self._files.forget()
        self._asked.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._asked.wait()
            except TimeoutError:
                pass
            self._asked.clear()
            if await asyncio.to_thread(self._files.look):
                self._tokens.replace(self._files.newest)
