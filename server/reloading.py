"""Reloads bearer tokens while the server runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

from turret.server.api.access import TokenTable, WatchedFiles

# How often the token file is checked for changes, without SIGHUP.
POLL_SECONDS = 5.0
NOTHING_TO_RELOAD = "nothing to read again: no --token-file"


class TokenReloader:
    """Reads a token file again when it has changed. An invalid file changes nothing.

    Args:
        path: The file.
        tokens: The table that gets the tokens of the file.
    """

    def __init__(self, path: Path, tokens: TokenTable) -> None:
        self._files = WatchedFiles((path,), lambda: TokenTable.read(path), "tokens")
        self._tokens = tokens
        self._asked = asyncio.Event()

    def reload(self) -> None:
        """Read the file now, even if it has not changed."""
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
