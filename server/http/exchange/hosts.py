"""Which names a server may be called by, against pages that rebind their own name to its address.

A page of evil.example may have its name resolve to this server after it was loaded; its requests
then are of the same origin for the browser, and only their Host header tells. An address in the
header cannot have been rebound, and neither can localhost, so both pass.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from turret.server.basics.codes import Code
from turret.server.http.exchange.refusals import HttpRefusal, refusal_of
from turret.server.http.exchange.reply import dumps

ANY = "*"
_SHOWN_CHARS = 200
_HOST = re.compile(r"(?:\[(?P<address>[0-9a-z:.%]+)\]|(?P<name>[^\s:@/?#\[\]\\]*))(?::[0-9]*)?")


class HostCheck:
    """Refuses requests to other names with status 421.

    Args:
        app: Answers the others.
        names: Further names; ``*`` lets all pass.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self._app = app
        self._names = {name.lower().rstrip(".") for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "")
        if ANY in self._names or self._passes(host):
            await self._app(scope, receive, send)
            return
        refusal = refusal_of(
            HttpRefusal(
                421,
                Code.PERMISSION_DENIED,
                f"this server is not known as {host[:_SHOWN_CHARS]!r}: call it by its address, or"
                " start it with --http-allowed-host",
                reason="unknown_host",
            )
        )
        await Response(
            dumps(refusal.body), refusal.status, refusal.headers, media_type="application/json"
        )(scope, receive, send)

    def _passes(self, host: str) -> bool:
        name = name_of(host)
        # A request without the header does not come from a browser.
        if not host.strip() or name == "localhost" or name.endswith(".localhost"):
            return True
        return name != "" and (name in self._names or is_address(name))


def name_of(host: str) -> str:
    """The name or address in a Host header, without port, brackets and a dot at the end.

    Empty where the header has another form (``localhost:80@evil.example``).
    """
    found = _HOST.fullmatch(host.strip().lower())
    return "" if found is None else found["address"] or found["name"].rstrip(".")


def is_address(name: str) -> bool:
    """Whether it is an IP address as such."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
