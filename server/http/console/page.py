"""GET / and /console/…: the files of the page, as they lie beside this module."""

from __future__ import annotations

import hashlib
from pathlib import Path

from turret.server.basics.codes import Code
from turret.server.http.endpoint import Exchange
from turret.server.http.refusals import HttpRefusal
from turret.server.words import say

FOLDER = Path(__file__).parent / "static"
INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The page runs its own scripts, asks its own server, and is shown in no frame; texts become nodes
# and never markup (with trusted types a browser refuses any other way).
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Browsers revalidate on every load and download again only if another version is installed.
    "cache-control": "no-cache",
}


class Page:
    """Sends the files. They are read once: nothing that a client sends becomes a path.

    They say nothing of the server, so that everyone may have them; what they show they ask for
    with the visitor's token.
    """

    def __init__(self) -> None:
        self._files = {
            path.name: path.read_bytes()
            for path in sorted(FOLDER.iterdir())
            if path.suffix in _TYPES
        }
        self._tags = {
            name: f'"{hashlib.sha256(data).hexdigest()[:32]}"' for name, data in self._files.items()
        }

    async def index(self, exchange: Exchange) -> None:
        """The page itself."""
        await self._send(exchange, INDEX)

    async def file(self, exchange: Exchange) -> None:
        """A file of the page.

        Raises:
            HttpRefusal: There is none of that name.
        """
        name = exchange.path["file"]
        if name not in self._files:
            text = say("UNKNOWN_URL", method="GET", path=f"/console/{name[:200]}")
            raise HttpRefusal(404, Code.NOT_FOUND, text)
        await self._send(exchange, name)

    async def _send(self, exchange: Exchange, name: str) -> None:
        headers = {**HEADERS, "etag": self._tags[name]}
        if exchange.headers.get("if-none-match") == self._tags[name]:
            await exchange.reply.whole(b"", 304, headers)
            return
        headers["content-type"] = _TYPES[Path(name).suffix]
        await exchange.reply.whole(self._files[name], 200, headers)
