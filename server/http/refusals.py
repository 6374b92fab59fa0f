"""A failed request in the form of OpenAI's API: a status, and JSON with one ``error``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from turret.server.api.call import fault_of
from turret.server.basics.codes import Code
from turret.server.words import Text, say


class HttpForm(NamedTuple):
    """The HTTP form of a code: the status, and the ``type`` of the error."""

    status: int
    kind: str


TABLE: dict[Code, HttpForm] = {
    Code.OK: HttpForm(200, ""),
    # The status that proxies log for a client that disconnected; no client receives it.
    Code.CANCELLED: HttpForm(499, "server_error"),
    Code.UNKNOWN: HttpForm(500, "server_error"),
    Code.INVALID_ARGUMENT: HttpForm(400, "invalid_request_error"),
    Code.DEADLINE_EXCEEDED: HttpForm(504, "timeout_error"),
    Code.NOT_FOUND: HttpForm(404, "invalid_request_error"),
    Code.ALREADY_EXISTS: HttpForm(409, "conflict_error"),
    Code.PERMISSION_DENIED: HttpForm(403, "permission_error"),
    Code.RESOURCE_EXHAUSTED: HttpForm(429, "rate_limit_error"),
    Code.FAILED_PRECONDITION: HttpForm(409, "conflict_error"),
    Code.ABORTED: HttpForm(409, "conflict_error"),
    Code.OUT_OF_RANGE: HttpForm(400, "invalid_request_error"),
    Code.UNIMPLEMENTED: HttpForm(501, "not_implemented_error"),
    Code.INTERNAL: HttpForm(500, "server_error"),
    Code.UNAVAILABLE: HttpForm(503, "server_error"),
    Code.DATA_LOSS: HttpForm(500, "server_error"),
    Code.UNAUTHENTICATED: HttpForm(401, "authentication_error"),
}
# HTTP status of an ``HttpRefusal`` → code. For other statuses, the code is INVALID_ARGUMENT.
_CODES = {
    **dict.fromkeys((404, 410), Code.NOT_FOUND),
    405: Code.UNIMPLEMENTED,
    408: Code.DEADLINE_EXCEEDED,
    421: Code.PERMISSION_DENIED,
}
# Codes of OpenAI's API for reasons that it knows; other reasons become lower-case codes.
OPENAI_CODES = {
    "ADAPTER_NOT_FOUND": "model_not_found",
    "PROMPT_TOO_LONG": "context_length_exceeded",
    "UNAUTHENTICATED": "invalid_api_key",
    "QUEUE_FULL": "rate_limit_exceeded",
    **dict.fromkeys(("URL_ELSEWHERE", "METHOD_NOT_ALLOWED"), "unknown_url"),
}
# Next steps for HTTP clients, by the reason of an error.
STEPS = {
    "ADAPTER_NOT_FOUND": "GET /v1/models lists the models",
    "ADAPTER_CLASSIFIES": "POST /classify labels texts",
    "ADAPTER_EXISTS": "set load_inplace to replace it, or remove it with /v1/unload_lora_adapter",
    "ADAPTER_BUSY": "`turret adapters unload --force` ends these requests",
    "ADAPTER_PINNED": "`turret adapters unpin` unpins it",
    "MERGE_ACTIVE": "`turret adapters unmerge` restores the base model",
    "UNAUTHENTICATED": "send the header `authorization: Bearer TOKEN` (api_key in OpenAI's"
    " clients)",
    "DEADLINE_EXCEEDED": "set a higher timeout or a lower max_tokens",
}
# Reasons of errors whose message only repeats their violations. Other messages contain more.
_ABOUT_FIELDS = ("INVALID_REQUEST", "PROMPT_TOO_LONG", "ADAPTER_CLASSIFIES", "HEAD_MISSING")
# The message repeats what the client sent, so limit it to about a page of text.
MAX_MESSAGE_CHARS = 4000


class HttpRefusal(Exception):
    """An error that occurs only over HTTP, such as an invalid path, method, size or media type.

    Args:
        status: The HTTP status.
        text: The message.

    Attributes:
        code: The code in the log and the metrics.
    """

    def __init__(self, status: int, text: Text) -> None:
        super().__init__(text)
        self.status = status
        self.code = _CODES.get(status, Code.INVALID_ARGUMENT)
        self.text = text


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An error answer: ``body`` as JSON after ``status`` and ``headers``, or as the last event."""

    status: int
    code: Code
    body: dict[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    event: str = ""


def refusal_of(error: BaseException, names: Mapping[str, str] | None = None) -> Refusal:
    """The refusal for a request that raised this error.

    Args:
        error: The error. An exception that is not turret's own becomes "internal error".
        names: The client's names for field paths of turret.v1, or for beginnings of paths that end
            in a dot.
    """
    headers = {"x-should-retry": "false"}
    if isinstance(error, HttpRefusal):
        kind = "invalid_request_error" if error.status < 500 else TABLE[error.code].kind
        body = _body(error.text, kind, None, error.text.reason)
        return Refusal(status=error.status, code=error.code, body=body, headers=headers)
    fault = fault_of(error)
    row = TABLE[fault.code]
    wrong = [_renamed(path, why, names or {}) for path, why in fault.violations]
    message, reason, param = fault.message, fault.reason, None
    if wrong:
        param = wrong[0][0]
        if reason in _ABOUT_FIELDS:
            message = "; ".join(f"{path}: {why}" for path, why in wrong)
    elif reason == "ADAPTER_NOT_FOUND":
        # Requests that manage adapters contain the name in another field than ``model``.
        param = (names or {}).get("name", "model")
    if reason == "INVALID_REQUEST":
        reason = getattr(wrong[0][1] if wrong else message, "reason", reason)
    # Add a next step only if the message does not suggest one already.
    suggested = {"closest", "step", "current_generation", "alias"} & set(
        getattr(fault.message, "params", ())
    )
    if fault.reason in STEPS and not suggested:
        message = f"{message}; {STEPS[fault.reason]}"
    if fault.retry_after_seconds is not None:
        seconds = str(max(1, round(fault.retry_after_seconds)))
        headers = {"x-should-retry": "true", "retry-after": seconds}
    if fault.code is Code.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    body = _body(message, row.kind, param, reason)
    if wrong:
        body["error"]["violations"] = [
            {"param": path, "code": getattr(why, "reason", fault.reason).lower(), "message": why}
            for path, why in wrong
        ]
    return Refusal(status=row.status, code=fault.code, body=body, headers=headers)


def _body(message: str, kind: str, param: str | None, reason: str) -> dict[str, Any]:
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[:MAX_MESSAGE_CHARS]}..."
    code = OPENAI_CODES.get(reason, reason.lower())
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _renamed(path: str, why: str, names: Mapping[str, str]) -> tuple[str, str]:
    """A violation with the client's own names for its field and for another that it mentions."""
    if isinstance(why, Text) and "other" in why.params:
        reason = why.reason
        why = say(reason, **{**why.params, "other": renamed_path(why.params["other"], names)})
    return renamed_path(path, names), why


def renamed_path(path: str, names: Mapping[str, str]) -> str:
    """The path with its beginning replaced according to the longest matching entry of ``names``."""
    ends = [index for index, char in enumerate(path) if char in ".["]
    for end in (len(path), *reversed(ends)):
        for start in (path[: end + 1] if path[end : end + 1] == "." else "", path[:end]):
            if start in names:
                return names[start] + path[len(start) :]
    return path
