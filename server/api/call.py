"""The RPC being answered: what the interceptor and the servicer tell each other about it."""

from __future__ import annotations

import contextvars
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from turret.server import log

REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID_CHARS = 128


def is_request_id(text: str) -> bool:
    """1 to 128 printable ASCII characters: safe in a header and in a log line."""
    return 0 < len(text) <= MAX_REQUEST_ID_CHARS and text.isascii() and text.isprintable()


@dataclass(slots=True)
class Call:
    """One RPC.

    The servicer notes what the interceptor counts in the end, however the call ends: ``adapters``
    is None until the request's mix is known, the token counts are 0 until the engine has answered.
    """

    method: str
    request_id: str
    adapters: tuple[str, ...] | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0

    @classmethod
    def begin(cls, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Call:
        """The call of the current task, under the id that the client sent or a new one."""
        sent = (value for key, value in metadata if key == REQUEST_ID_KEY)
        usable = (value for value in sent if isinstance(value, str) and is_request_id(value))
        call = cls(method, next(usable, None) or uuid.uuid4().hex)
        _current.set(call)
        log.request_id.set(call.request_id)
        return call

    def rename(self, request_id: str) -> None:
        """Take the id that the request message itself carries."""
        self.request_id = request_id
        log.request_id.set(request_id)


_current: contextvars.ContextVar[Call] = contextvars.ContextVar("call")


def current_call() -> Call:
    """The call that the current task answers; a fresh one outside any RPC."""
    try:
        return _current.get()
    except LookupError:
        return Call.begin("", ())
