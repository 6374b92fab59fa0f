"""Writes the answer: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from pydantic_core import to_json
from starlette.types import Send

from turret.server.api.call import REQUEST_ID_KEY, Call
from turret.server.api.inference_answers import converted
from turret.server.http.connection import Chunks
from turret.server.http.refusals import Refusal

_JSON = {"content-type": "application/json"}
_PIECE_BYTES = 1 << 18
_DONE = b"data: [DONE]\n\n"
_COMMENT = b": still working\n\n"
_EVENTS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # Without this header, buffering proxies would hold the answer back until its end.
    "x-accel-buffering": "no",
}


def dumps(value: Any) -> bytes:
    """JSON as UTF-8, on one line."""
    return to_json(value, inf_nan_mode="null")


def _object(value: Mapping[str, Any]) -> bytes:
    """An object as JSON. Lists are encoded item by item, because the encoder holds the GIL."""
    parts = []
    for key, each in value.items():
        is_list = isinstance(each, list | Iterator)
        part = b"[%b]" % b",".join(map(dumps, each)) if is_list else dumps(each)
        parts.append(b"%b:%b" % (dumps(key), part))
    return b"{%b}" % b",".join(parts)


def event_bytes(value: Any, name: str = "") -> bytes:
    """The bytes of an event, with a name if it has one."""
    named = b"event: %b\n" % name.encode() if name else b""
    return b"%bdata: %b\n\n" % (named, dumps(value))


class Reply:
    """The answer to one request.

    Args:
        send: ASGI's ``send`` function.
        call: The call, which has the request's id.
        chunks: Sends events directly, if the server supports that.

    Attributes:
        is_begun: Whether the status has been sent, so that it cannot change any more.
        is_ended: Whether the last byte has been sent.
        is_stream: Whether the answer will be events, so that comments may be sent before and
            between them.
    """

    def __init__(self, send: Send, call: Call, chunks: Chunks | None = None) -> None:
        self._send = send
        self._call = call
        self._chunks = chunks
        self.is_begun = False
        self.is_ended = False
        self.is_stream = False
        self._was_quiet = False

    async def keep_alive(self) -> None:
        """Send a comment if nothing was sent since the last call. The comment may begin the answer.

        Otherwise, proxies and clients would close the idle connection.
        """
        if not self._was_quiet:
            self._was_quiet = True
        elif self.is_stream and not self.is_ended:
            await self.send_event(_COMMENT)

    async def json(
        self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a value as the whole answer.

        Raises:
            QueueFullError: See ``Call.send``. Errors are too small to count.
        """
        body = dumps(value)
        if status < 400:
            self._call.send(len(body))
        await self.whole(body, status, {**_JSON, **(headers or {})})

    async def made_json(self, make: Callable[[], Mapping[str, Any]], size: int) -> None:
        """Send an object as the whole answer. A large one is built off the event loop.

        Args:
            make: Returns the object; iterators in it become lists.
            size: See ``converted``.

        Raises:
            QueueFullError: See ``Call.send``.
        """
        body = await converted(self._call.tenant, size, lambda: _object(make()))
        self._call.send(len(body))
        await self.whole(body, 200, _JSON)

    async def whole(self, body: bytes, status: int, headers: Mapping[str, str]) -> None:
        """Send bytes as the whole answer, piece by piece as the client reads them.

        The call therefore does not end before almost all of the answer has been read.
        """
        await self._begin(status, {**headers, "content-length": str(len(body))})
        last = max(len(body) - 1, 0) // _PIECE_BYTES * _PIECE_BYTES
        for start in range(0, last, _PIECE_BYTES):
            await self._write(body[start : start + _PIECE_BYTES])
        await self._write(body[last:], is_last=True)

    async def stream(self, parts: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        """Send the parts of a body whose length is among the headers."""
        await self._begin(200, headers)
        async for part in parts:
            await self._write(part)
        await self._write(b"", is_last=True)

    async def event(self, value: Any, name: str = "") -> None:
        """Send an event, with a name if it has one. The first event begins the answer."""
        await self.send_event(event_bytes(value, name))

    async def send_event(self, event: bytes) -> None:
        """Send an event that is already encoded. The first event begins the answer."""
        self._was_quiet = False
        if not self.is_begun:
            await self._begin(200, _EVENTS)
        if self._chunks is not None:
            await self._chunks.write(event)
        else:
            await self._write(event)

    async def end_events(self, *, has_done: bool = True) -> None:
        """End the stream, by default with OpenAI's end mark."""
        await self._write(_DONE if has_done else b"", is_last=True)

    async def refuse(self, refusal: Refusal) -> None:
        """Send an error: as a status, or as the last event if the answer has begun."""
        if not self.is_begun:
            await self.json(refusal.body, refusal.status, refusal.headers)
        elif not self.is_ended:
            await self._write(event_bytes(refusal.body, refusal.event), is_last=True)

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.is_begun = True
        every = {**headers, REQUEST_ID_KEY: self._call.request_id}
        raw = [(name.encode("latin-1"), text.encode("latin-1")) for name, text in every.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _write(self, body: bytes, is_last: bool = False) -> None:
        if self._chunks is not None:
            self._chunks.flush()
        self.is_ended = is_last
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})


# Placeholder for the text. It is random, so no text from a client contains it.
HOLE = uuid.uuid4().hex


class Template:
    """The bytes of an event around its text, encoded once.

    Args:
        value: The event, with ``HOLE`` for the text.
    """

    def __init__(self, value: Any) -> None:
        self._before, _, self._after = event_bytes(value).partition(dumps(HOLE))

    def event(self, text: str) -> bytes:
        """The event with this text."""
        return self._before + dumps(text) + self._after
