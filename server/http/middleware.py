"""The layers around the routes: the check of host names, request ids, and errors for unknown paths.

The check of the host name protects against DNS rebinding: after a page of evil.example was loaded,
its owner can make that name resolve to this server. The browser then treats requests to this server
as requests to the page's own origin, and only their Host header shows the difference. An IP address
or localhost cannot be rebound, so both are accepted.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret.server.api.call import REQUEST_ID_KEY, request_id_of
from turret.server.basics.codes import Code
from turret.server.http.endpoint import dumps
from turret.server.http.refusals import HttpRefusal, refusal_of
from turret.server.http.schemas.fields import slip_of
from turret.server.words import say

ANY = "*"
_SHOWN_CHARS = 200
# Unrelated short paths also differ in few letters, so a similar spelling proves nothing.
_SHORT_PATH = 10
_HOST = re.compile(r"(?:\[(?P<address>[0-9a-z:.%]+)\]|(?P<name>[^\s:@/?#\[\]\\]*))(?::[0-9]*)?")


class HostCheck:
    """Rejects requests to other host names with status 421.

    Args:
        app: The application that answers accepted requests.
        names: Additional accepted names; ``*`` accepts all.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self._app = app
        self._names = {name.lower().rstrip(".") for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "")
        if ANY in self._names or self._passes(host):
            await self._app(scope, receive, send)
            return
        text = say("UNKNOWN_HOST", host=host[:_SHOWN_CHARS])
        refused = _response(HttpRefusal(421, Code.PERMISSION_DENIED, text))
        await refused(scope, receive, send)

    def _passes(self, host: str) -> bool:
        name = name_of(host)
        # A request without the header does not come from a browser.
        if not host.strip() or name == "localhost" or name.endswith(".localhost"):
            return True
        return name != "" and (name in self._names or is_address(name))


def name_of(host: str) -> str:
    """The name or address in a Host header, without port, brackets and a dot at the end.

    Empty if the header has another form (``localhost:80@evil.example``).
    """
    found = _HOST.fullmatch(host.strip().lower())
    return "" if found is None else found["address"] or found["name"].rstrip(".")


def is_address(name: str) -> bool:
    """Whether a host is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class RequestIds:
    """Adds ``x-request-id`` to answers without one: those to unknown paths, methods and hosts.

    Args:
        app: The application that answers.
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


async def no_route(apart: Collection[str], request: Request, error: Exception) -> Response:
    """Reports what Starlette itself rejects: an unknown path or method.

    Args:
        apart: Paths that are served at a separate address.
        request: The rejected request.
        error: Starlette's error.
    """
    assert isinstance(error, HTTPException)
    headers = error.headers or {}
    method, path = request.method, request.url.path[:_SHOWN_CHARS]
    if path.rstrip("/") in apart:
        text = say("URL_ELSEWHERE", method=method, path=path)
    elif error.status_code == 405:
        allowed = headers.get("Allow", "").split(", ")
        methods = " or ".join(each for each in allowed if each != "HEAD")
        text = say("METHOD_NOT_ALLOWED", method=method, path=path, allowed=methods)
    else:
        meant = _meant(request)
        closest = {"closest": meant} if meant else {}
        text = say("UNKNOWN_URL", method=method, path=path, **closest)
    code = Code.NOT_FOUND if error.status_code == 404 else Code.UNIMPLEMENTED
    return _response(HttpRefusal(error.status_code, code, text), headers)


def _meant(request: Request) -> str:
    """The path that a client probably meant, with or without ``/v1``; "" if there is none."""
    parts = [part for part in request.url.path.split("/") if part]
    while parts and parts[0].lower() == "v1":
        del parts[0]
    if not (named := "/".join(parts)):
        return ""
    served = {getattr(route, "path", "").rstrip("/") for route in request.app.routes}
    wanted = (f"/v1/{named}", f"/{named}", f"/v1/{named}s")
    if found := next((path for path in wanted if path in served), ""):
        return found
    return slip_of(wanted[0], (path for path in served if len(path) > _SHORT_PATH))


def _response(error: HttpRefusal, headers: Mapping[str, str] | None = None) -> Response:
    refusal = refusal_of(error)
    every = {**refusal.headers, **(headers or {})}
    return Response(dumps(refusal.body), refusal.status, every, media_type="application/json")
