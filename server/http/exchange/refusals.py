"""A failed request in the form of OpenAI's API: a status, and JSON with one ``error``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from turret.server.api.faults import Fault, fault_of
from turret.server.basics.codes import Code


class Row(NamedTuple):
    """The HTTP form of a code: the status, and the ``type`` of the error."""

    status: int
    kind: str


TABLE: dict[Code, Row] = {
    Code.OK: Row(200, ""),
    # The status that proxies log for a client that went away; no client sees it.
    Code.CANCELLED: Row(499, "server_error"),
    Code.UNKNOWN: Row(500, "server_error"),
    Code.INVALID_ARGUMENT: Row(400, "invalid_request_error"),
    Code.DEADLINE_EXCEEDED: Row(504, "timeout_error"),
    Code.NOT_FOUND: Row(404, "invalid_request_error"),
    Code.ALREADY_EXISTS: Row(409, "conflict_error"),
    Code.PERMISSION_DENIED: Row(403, "permission_error"),
    Code.RESOURCE_EXHAUSTED: Row(429, "rate_limit_error"),
    Code.FAILED_PRECONDITION: Row(409, "conflict_error"),
    Code.ABORTED: Row(409, "conflict_error"),
    Code.OUT_OF_RANGE: Row(400, "invalid_request_error"),
    Code.UNIMPLEMENTED: Row(501, "not_implemented_error"),
    Code.INTERNAL: Row(500, "server_error"),
    Code.UNAVAILABLE: Row(503, "server_error"),
    Code.DATA_LOSS: Row(500, "server_error"),
    Code.UNAUTHENTICATED: Row(401, "authentication_error"),
}
# Reasons that OpenAI's API has a word for; the others are turret's own, in lower case.
OPENAI_CODES = {
    "ADAPTER_NOT_FOUND": "model_not_found",
    "PROMPT_TOO_LONG": "context_length_exceeded",
    "UNAUTHENTICATED": "invalid_api_key",
    "QUEUE_FULL": "rate_limit_exceeded",
}
_TOKEN = (
    "; send 'authorization: Bearer TOKEN' with a token of the server's --token-file, which OpenAI's"
    " clients do with api_key"
)
# Next steps for HTTP clients. They replace those that name calls of turret.v1, and add some that
# gRPC clients provide themselves.
_STEPS = {
    "what lies elsewhere can be uploaded": "`turret adapters upload` sends what lies elsewhere",
    "the deadline passed before the request finished": "`timeout` passed before the answer was"
    " complete; send a higher one, or ask for less",
    **{
        said: said + _TOKEN
        for said in (
            "the call carries no 'authorization: Bearer TOKEN'",
            "'authorization' does not have the form 'Bearer TOKEN'",
            "the token is unknown",
        )
    },
}
# Next steps by the reason of an error.
_HINTS = {
    "ADAPTER_CLASSIFIES": "POST /classify labels texts",
    "HEAD_MISSING": "POST /v1/chat/completions or /v1/completions for text",
    "ADAPTER_EXISTS": "load_inplace true replaces it, /v1/unload_lora_adapter removes it",
    "ADAPTER_BUSY": "`turret adapters unload --force` ends these requests",
    "ADAPTER_PINNED": "`turret adapters unpin` unpins it",
    **dict.fromkeys(("ADAPTER_MERGED", "MERGE_ACTIVE"), "`turret adapters unmerge` takes it out"),
}
# A field of turret.v1 that messages about other fields mention.
_LIMIT = "stop.max_tokens"
# The message repeats what the client sent, so limit it to about a page of text.
MAX_MESSAGE_CHARS = 4000


class HttpRefusal(Exception):
    """A refusal that only HTTP has: of a path, a method, a size or a media type.

    Args:
        status: The HTTP status.
        code: What the log and the metrics call it.
        message: For people.
        reason: For programs: the ``code`` of the error.
        param: The field to blame, or None.
    """

    def __init__(
        self, status: int, code: Code, message: str, *, reason: str, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.reason = reason
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What is sent: ``body`` as JSON after ``status`` and ``headers``."""

    status: int
    code: Code
    body: dict[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


def refusal_of(error: BaseException, names: Mapping[str, str] | None = None) -> Refusal:
    """The refusal for a request that raised this error.

    Args:
        error: What was raised. What turret did not raise on purpose becomes "internal error".
        names: Field paths of turret.v1, or beginnings of paths that end in a dot, to the names
            that the client knows them by.
    """
    if isinstance(error, HttpRefusal):
        kind = "invalid_request_error" if error.status < 500 else TABLE[error.code].kind
        body = _body(error.message, kind, error.param, error.reason)
        return Refusal(
            status=error.status, code=error.code, body=body, headers={"x-should-retry": "false"}
        )
    fault = fault_of(error)
    row = TABLE[fault.code]
    message, param = _said(fault, names or {})
    for step, here in _STEPS.items():
        message = message.replace(step, here)
    if hint := _HINTS.get(fault.reason):
        message += f"; {hint}"
    reason = OPENAI_CODES.get(fault.reason, fault.reason.lower())
    headers = {"x-should-retry": "false"}
    if fault.retry_after_seconds is not None:
        seconds = str(max(1, round(fault.retry_after_seconds)))
        headers = {"x-should-retry": "true", "retry-after": seconds}
    if fault.code is Code.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    return Refusal(
        status=row.status,
        code=fault.code,
        body=_body(message, row.kind, param, reason),
        headers=headers,
    )


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[:MAX_MESSAGE_CHARS] + "..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _said(fault: Fault, names: Mapping[str, str]) -> tuple[str, str | None]:
    """The message in the client's own field names, and the first field to blame."""
    if not fault.violations:
        is_absent = fault.reason == "ADAPTER_NOT_FOUND"
        # Paths that manage adapters have the name in a field of its own.
        param = names.get("name", "model") if is_absent else None
        return fault.message + _next_step(fault, param), param
    limit = renamed_path(_LIMIT, names)
    renamed = [
        (renamed_path(path, names), why.replace(_LIMIT, limit)) for path, why in fault.violations
    ]
    message = renamed_message(fault.message, fault.violations, renamed)
    if fault.reason == "PROMPT_TOO_LONG" and limit != _LIMIT:
        message = message.replace("max_tokens", limit)
    return message, renamed[0][0]


def _next_step(fault: Fault, param: str | None) -> str:
    """The next step for a client that names an unknown model, such as its own default."""
    is_one = fault.message.startswith(("adapter not found: ", "the model "))
    is_told = "; " in fault.message or "the current one" in fault.message
    if param is None or not is_one or is_told:
        return ""
    base = ", and 'base' is the base model" if param == "model" else ""
    return f"; GET /v1/models lists what there is{base}"


def renamed_message(
    message: str, violations: Sequence[tuple[str, str]], renamed: Sequence[tuple[str, str]]
) -> str:
    """A message that begins with a field and its error, with the field renamed."""
    said, instead = ("; ".join(f"{p}: {why}" for p, why in each) for each in (violations, renamed))
    return instead + message[len(said) :] if message.startswith(said) else message


def renamed_path(path: str, names: Mapping[str, str]) -> str:
    """The path with its beginning replaced according to the longest matching entry of ``names``."""
    ends = [index for index, char in enumerate(path) if char in ".["]
    for end in (len(path), *reversed(ends)):
        for start in (path[: end + 1] if path[end : end + 1] == "." else "", path[:end]):
            if start in names:
                return names[start] + path[len(start) :]
    return path
