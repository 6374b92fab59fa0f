"""The id that every answer has, those included that no endpoint gives."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret.server.api.call import REQUEST_ID_KEY, request_id_of


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
