"""Reads the JSON of a request within limits of size, time and depth."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import json.decoder
import json.scanner
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from starlette.types import Receive

from turret.server.basics.codes import Code
from turret.server.errors import InvalidRequestError
from turret.server.http.exchange.refusals import HttpRefusal
from turret.server.http.exchange.shape import (
    ANY,
    MANY,
    MAX_CONTAINERS,
    MAX_DEPTH,
    Shape,
    check_shape,
)

# The same limit as for a gRPC message.
MAX_BODY_BYTES = 4 << 20
# A client that sends its body more slowly has gone, or holds a slot that others wait for.
BODY_SECONDS = 60.0
# Parsing more than this takes longer than about a millisecond, so it leaves the event loop.
_INLINE_BYTES = 32 << 10
# Large bodies are parsed one at a time: one of 4 MiB can make 60 MiB of objects before its shape is
# known, and bodies of several clients would add up.
_parser = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="turret-body")

# The type stubs of json omit its parsers written in Python.
_json: Any = json
_GZIP = b"\x1f\x8b"


class _NoNumberError(ValueError):
    """A number that Python's parser accepts although it is not JSON."""


class _ManyError(Exception):
    """A body holds more lists and objects than it may."""


class ClientGoneError(Exception):
    """The client closed the connection before its request was complete."""


async def read_json(
    receive: Receive, headers: Mapping[str, str], shape: Shape = ANY
) -> tuple[dict[str, Any], int]:
    """The object that the request's body holds, and the body's size in bytes.

    Args:
        receive: Of ASGI.
        headers: Those of the request.
        shape: How large the lists and objects in the body may be.

    Raises:
        HttpRefusal: It is too large, too slow, compressed, or declared to be no JSON.
        InvalidRequestError: It is no JSON object, or larger than its shape.
        ClientGoneError: It never arrived in full.
    """
    # A page of another origin may send any other media type without asking; JSON it may send
    # only after a preflight, which --http-cors-origin answers.
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HttpRefusal(
            415,
            Code.INVALID_ARGUMENT,
            "the body must be JSON, with the header content-type: application/json",
            reason="unsupported_media_type",
        )
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise HttpRefusal(
            415,
            Code.INVALID_ARGUMENT,
            f"a compressed body is not taken: send the JSON as it is, not in {encoding[:40]!r}",
            reason="unsupported_media_type",
        )
    data = await read_body(receive, headers)
    if len(data) <= _INLINE_BYTES:
        return parse(data, shape), len(data)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_parser, parse, data, shape), len(data)


async def read_body(receive: Receive, headers: Mapping[str, str]) -> bytes:
    """The bytes of a request's body; see ``read_json`` for what it raises."""
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise _too_large()
    parts = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                parts += message.get("body", b"")
                if len(parts) > MAX_BODY_BYTES:
                    raise _too_large()
                if not message.get("more_body", False):
                    return bytes(parts)
    except TimeoutError:
        raise HttpRefusal(
            408,
            Code.DEADLINE_EXCEEDED,
            f"the body did not arrive within {BODY_SECONDS:.0f} seconds",
            reason="request_timeout",
        ) from None


def parse(data: bytes, shape: Shape = ANY) -> dict[str, Any]:
    """The object that the bytes hold.

    The time that it takes grows with the number of bytes, whatever they are.

    Raises:
        InvalidRequestError: They hold none, one that is larger than its shape, or one with a name
            that is no text, which no answer could say.
    """
    try:
        # Some editors write a byte order mark before UTF-8.
        text = data.decode("utf-8-sig")
        body = (_Careful() if _may_be_many(data) else _quick).decode(text)
    except RecursionError:
        raise InvalidRequestError(f"the body is nested more than {MAX_DEPTH} deep") from None
    except _ManyError:
        raise InvalidRequestError(MANY) from None
    except ValueError as error:
        raise InvalidRequestError(_why_no_json(data, error)) from None
    if not isinstance(body, dict):
        raise InvalidRequestError("the body must be a JSON object")
    # Only escapes can produce half of a surrogate pair: UTF-8 cannot encode one.
    check_shape(body, shape, checks_names=b"\\ud" in data or b"\\uD" in data)
    return body


def _why_no_json(data: bytes, error: Exception) -> str:
    """Why a body whose parsing raised this error is not JSON."""
    if not data:
        return "the body is empty: it must be a JSON object"
    if data.startswith(_GZIP):
        return "the body is compressed: send the JSON as it is"
    # UTF-16 and UTF-32 encode every ASCII character with a zero byte.
    if b"\0" in data[:4]:
        return "the body is not UTF-8, as JSON must be: it may be UTF-16"
    if isinstance(error, UnicodeDecodeError):
        return f"the body is not UTF-8, as JSON must be: see byte {error.start}"
    if isinstance(error, json.JSONDecodeError | _NoNumberError):
        return f"the body is no JSON: {error}"
    # The remaining case is an integer with more digits than Python parses.
    return f"a number in the body has more than {sys.get_int_max_str_digits()} digits"


def _number(text: str) -> float:
    """A number with a fraction or an exponent.

    Some take microseconds each (``1e-400``). A function of Python's own lets other threads run
    between them; without it the parser would hold the interpreter for more than a second.
    """
    return float(text)


def _refuse_constant(text: str) -> NoReturn:
    raise _NoNumberError(f"{text} is no JSON number")


def _may_be_many(data: bytes) -> bool:
    """Whether there may be more lists and objects than a body may hold.

    What stands in texts counts too, so that this is a bound and no answer.
    """
    return data.count(b"[") + data.count(b"{") > MAX_CONTAINERS


_quick = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_number)


class _Careful(json.JSONDecoder):
    """A decoder that gives up at the first list or object over the limit.

    The C parser would make millions of objects, and no other thread would run meanwhile. This is
    json's parser in Python, which is slow for many numbers and as fast for long texts.
    """

    def __init__(self) -> None:
        super().__init__(parse_constant=_refuse_constant, parse_float=_number)
        self._num_made = 0
        self.parse_array = self._counted(_json.decoder.JSONArray)
        self.parse_object = self._counted(_json.decoder.JSONObject)
        self.scan_once = _json.scanner.py_make_scanner(self)

    def _counted(self, parse: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self._num_made += 1
            if self._num_made > MAX_CONTAINERS:
                raise _ManyError
            return parse(*args)

        return counted


def _too_large() -> HttpRefusal:
    return HttpRefusal(
        413,
        Code.INVALID_ARGUMENT,
        f"the body must be at most {MAX_BODY_BYTES} bytes",
        reason="request_too_large",
    )
