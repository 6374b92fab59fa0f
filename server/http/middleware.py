"""What every request passes: the check of its host name, and the id that its answer gets.

The check of the host name protects against DNS rebinding: a page of evil.example may have its name
resolve to this server after the page was loaded. The browser then takes its requests for requests
of the same origin, and only their Host header shows the difference. An IP address in the header
cannot have been rebound, and neither can localhost, so both pass.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret.server.api.call import REQUEST_ID_KEY, request_id_of
from turret.server.basics.codes import Code
from turret.server.http.refusals import HttpRefusal, refusal_of
from turret.server.http.reply import dumps
from turret.server.words import say

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
            HttpRefusal(421, Code.PERMISSION_DENIED, say("UNKNOWN_HOST", host=host[:_SHOWN_CHARS]))
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


class RequestIds:
    """Adds ``x-request-id`` to answers that lack it: to other paths, methods and host names.

    Args:
        app: Answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = Headers(scope=scope).getlist(REQUEST_ID_KEY)
                MutableHeaders(scope=message).setdefault(REQUEST_ID_KEY, request_id_of(sent))
            await send(message)

        await self._app(scope, receive, named)
