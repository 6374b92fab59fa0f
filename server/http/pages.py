"""The files of the console and of /docs, the page that shows the OpenAPI document."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from turret.server.http.endpoint import Exchange
from turret.server.http.refusals import HttpRefusal
from turret.server.words import say

FOLDER = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'; "
)
# The console inserts text only as text nodes; with trusted types, the browser rejects markup.
_CONSOLE_POLICY = (
    "style-src 'self'; img-src 'self'; require-trusted-types-for 'script'; trusted-types 'none'"
)
# Swagger UI styles its elements inline; everything else is loaded from this server.
_DOCS_POLICY = "style-src 'self' 'unsafe-inline'; img-src 'self' data:"
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Browsers revalidate on every load, and download again only after another version is installed.
    "cache-control": "no-cache",
}
_DOCS = b"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>turret HTTP API</title>
<link rel="stylesheet" href="/docs/swagger-ui.css">
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</html>
"""
_START = b'SwaggerUIBundle({url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true});\n'


class Page:
    """Sends a page's files. They are public; the page requests its data with the visitor's token.

    Args:
        folder: The path of the files in URLs.
        files: The files by name, so that no text from a client becomes a path.
        policy: Directives to add to the content security policy that all pages share.
    """

    def __init__(self, folder: str, files: Mapping[str, bytes | Path], policy: str) -> None:
        self._folder = folder
        self._files = files
        self._headers = {**_HEADERS, "content-security-policy": _POLICY + policy}

    async def __call__(self, exchange: Exchange) -> None:
        """Send a file of the page, or the page itself if the path names no file.

        Raises:
            HttpRefusal: The page has no file of that name.
        """
        name = exchange.request.path_params.get("file", "index.html")
        if name not in self._files:
            text = say("UNKNOWN_URL", method="GET", path=f"{self._folder}/{name[:200]}")
            raise HttpRefusal(404, text)
        data, tag = self._read(name)
        headers = {**self._headers, "etag": tag}
        if exchange.request.headers.get("if-none-match") == tag:
            await exchange.reply.whole(b"", 304, headers)
        else:
            headers["content-type"] = _TYPES[Path(name).suffix]
            await exchange.reply.whole(data, 200, headers)

    @functools.cache  # noqa: B019 - there are two pages, which live as long as the process
    def _read(self, name: str) -> tuple[bytes, str]:
        found = self._files[name]
        data = found.read_bytes() if isinstance(found, Path) else found
        return data, f'"{hashlib.sha256(data).hexdigest()[:32]}"'


def console() -> Page:
    """The console, which other pages must not show in a frame."""
    files = {path.name: path for path in FOLDER.iterdir() if path.suffix in _TYPES}
    return Page("/console", files, _CONSOLE_POLICY)


def docs() -> Page:
    """Swagger UI from an installed package, so that it works without the internet."""
    # Find the package without importing it: the import takes a third of a second.
    spec = find_spec("fastapi_offline")
    assert spec is not None
    assert spec.origin is not None
    static = Path(spec.origin).parent / "static"
    names = ("swagger-ui.css", "swagger-ui-bundle.js")
    files = {"index.html": _DOCS, "start.js": _START, **{name: static / name for name in names}}
    return Page("/docs", files, _DOCS_POLICY)
