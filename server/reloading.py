"""Tokens and certificates that change while the server runs."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from turret.server import log
from turret.server.api.file_stamp import file_stamp
from turret.server.api.tokens import TokenTable

_log = logging.getLogger(__name__)

# How soon a changed token file is noticed without SIGHUP.
POLL_SECONDS = 5.0


class TokenReloader:
    """Reads a token file again when it has changed; a file that is no good changes nothing.

    Args:
        path: The file.
        tokens: What was read from it at the start.
    """

    def __init__(self, path: Path, tokens: TokenTable) -> None:
        self._path = path
        self._tokens = tokens
        self._seen = file_stamp((path,))
        self._asked = asyncio.Event()

    def reload(self) -> None:
        """Look at once, changed or not."""
        self._seen = None
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
            stamp = await asyncio.to_thread(file_stamp, (self._path,))
            if stamp == self._seen:
                continue
            self._seen = stamp
            try:
                self._tokens.replace(await asyncio.to_thread(TokenTable.read, self._path))
            except (OSError, ValueError) as error:
                _log.error("tokens stay as they were", extra=log.fields(reason=error))
            else:
                _log.info("tokens read again")
