"""The exceptions of failed calls: one class per kind, with the details that the server sent.

TurretRpcError
├── InvalidArgumentError      a field is outside its documented range, or a checkpoint is rejected
├── AuthenticationError       no token, or an unknown one
├── PermissionDeniedError     the token lacks the role
├── NotFoundError             no adapter of that name (or generation)
├── AlreadyExistsError        the name is taken by other weights
├── FailedPreconditionError   the state does not allow it: in use, pinned, another base, merged
├── RateLimitedError          a queue or a budget is full; ``retry_delay`` may be set
├── DeadlineExceededError     the deadline passed first
├── AbortedError              an adapter was unloaded by force during the call
├── CallCancelledError        the call was cancelled, or its client closed
├── UnavailableError          the server is starting or stopping, or cannot be reached
│   └── AnswerCutError        a stopping server ended the answer early
└── ServerError               anything else: a bug in the server, a service at another address
"""

from __future__ import annotations

import copy
import copyreg
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import grpc
from google.protobuf import message
from google.rpc import error_details_pb2, status_pb2

from turret.clients.fields import argument
from turret.clients.results import Completion
from turret.clients.words import say

# Reason → hint. Braces take values of the error's metadata.
HINTS: Mapping[str, str] = {
    "ADAPTER_NOT_FOUND": "adapters.list() returns the registered adapters",
    "ADAPTER_EXISTS": "replace it with adapters.replace(), or remove it with adapters.unload()",
    "ADAPTER_CLASSIFIES": "call classify()",
    "ADAPTER_PINNED": "call adapters.unpin() first",
    "ADAPTER_BUSY": 'mode="force" ends these requests',
    "MERGE_ACTIVE": "call adapters.unmerge() first",
    "UNAUTHENTICATED": "pass a token of the server's --token-file as token=",
    "SERVICE_ELSEWHERE": "pass both address= and admin_address= to the client",
    "SERVER_STARTING": "pass a larger max_retries= to the client to wait for the server",
    "DEADLINE_EXCEEDED": "raise timeout=, which was {timeout}",
    "NOT_REACHED": "start one with `turret serve`",
    "NOT_GRPC": "use the address of `turret serve --address` (port 50051 by default), not that of"
    " --http-address",
    "CONNECTION_CLOSED": "pass tls=Tls(...) if the server has TLS",
    "REQUEST_TOO_LARGE": "shorten the prompt, or spread several inputs over several calls",
    "ANSWER_TOO_LARGE": "lower top_n or logprobs, or pass fewer inputs in a call",
}
# The same for the command line. Reasons that are not listed have no hint.
COMMAND_HINTS: Mapping[str, str] = {
    "ADAPTER_NOT_FOUND": "`turret adapters list` shows the registered adapters",
    "ADAPTER_EXISTS": "replace it with `turret adapters replace` or `upload --replace`, or remove"
    " it with `turret adapters unload {adapter}`",
    "ADAPTER_CLASSIFIES": "use `turret classify` or `turret eval --classify`",
    "ADAPTER_PINNED": "run `turret adapters unpin {adapter}` first",
    "ADAPTER_BUSY": "--force ends these requests",
    "MERGE_ACTIVE": "run `turret adapters unmerge` first",
    "UNAUTHENTICATED": "pass a token of the server's --token-file with --token, --token-from or"
    " TURRET_TOKEN",
    "SERVICE_ELSEWHERE": "pass that address with --address or TURRET_ADDRESS",
    "SERVER_STARTING": "`turret health --wait 600` returns when the server is ready",
    "DEADLINE_EXCEEDED": "raise --timeout, which was {timeout}",
    "NOT_REACHED": "start one with `turret serve`",
    "NOT_GRPC": "pass the address of `turret serve --address` (port 50051 by default), not that of"
    " --http-address",
    "CONNECTION_CLOSED": "pass --tls or --tls-ca if the server has TLS",
    "REQUEST_TOO_LARGE": "shorten the prompt, or spread several texts over several calls",
    "ANSWER_TOO_LARGE": "lower --top-n or --logprobs, or pass fewer texts in a call",
}
# If an error's metadata has one of these keys, the message already says what to do.
_ANSWERS = ("closest", "current_generation", "alias")


def hint_for(key: str, metadata: Mapping[str, str], hints: Mapping[str, str]) -> str:
    """The next step; empty if none is certain.

    Args:
        key: The reason of an error, or the name of its status if it has none.
        metadata: The error's metadata.
        hints: The table for the interface: ``HINTS`` or ``COMMAND_HINTS``.
    """
    if any(name in metadata for name in _ANSWERS):
        return ""
    try:
        return hints.get(key, "").format_map(metadata)
    except KeyError:
        return ""


# gRPC reports its own failures only as text. The patterns from here to cause_of() match that text,
# never a message of turret's.
_FAILED = re.compile(
    r"failed to connect to all addresses; last error: [A-Z_]+: (?:ipv[46]:)?(?P<place>.*?):"
    r" (?:Failed to connect to remote host: )?(?P<why>.*)",
    re.DOTALL,
)
_UNRESOLVED = re.compile(r"errors resolving (?P<place>\S+): \[")
_TOO_LARGE = re.compile(
    r"(?P<end>SERVER: |CLIENT: )?Received message larger than max \((\d+) vs\. (\d+)\)"
)
# Messages for calls that the caller itself ended.
_OWN_DOING = re.compile("Locally cancelled|Channel closed|Channel is closed")
# Messages for a server, or a proxy in front of it, that vanished without a status. The last one is
# HAProxy's, for a server that is gone.
_LOST = re.compile(
    "RST_STREAM|Stream removed|GOAWAY|Connection reset|Socket closed|http2 header with status: 500"
)
# Failures of a connection to something that listens: pattern → reason.
_ANSWERED = {
    r"Failed parsing HTTP/2|http1\.x server|HTTP/1\.": "NOT_GRPC",
    "handshake|Hostname Verification": "TLS_FAILED",
    # A server with TLS closes the connections of clients without TLS or without a required
    # certificate.
    "Socket closed": "CONNECTION_CLOSED",
}
# Reasons for calls that no turret server accepted: something else listens at the address, nothing
# does, or the connection or the answer was interrupted.
UNREACHED = frozenset((*_ANSWERED.values(), "NOT_REACHED", "CONNECTION_LOST", "ANSWER_CUT"))


def cause_of(code: grpc.StatusCode, said: str) -> tuple[grpc.StatusCode, str, str]:
    """Status, reason and message for a failure that no turret server has described.

    Args:
        code: The code that gRPC reports.
        said: gRPC's own message.
    """
    status = grpc.StatusCode
    if found := _TOO_LARGE.search(said):
        sizes = {"size": found[2], "most": found[3]}
        if found["end"] == "CLIENT: ":
            return status.INVALID_ARGUMENT, "ANSWER_TOO_LARGE", say("ANSWER_TOO_LARGE", **sizes)
        return status.INVALID_ARGUMENT, "REQUEST_TOO_LARGE", say("REQUEST_ABOVE_LIMIT", **sizes)
    if code is status.DEADLINE_EXCEEDED:
        return code, "", say("NOT_IN_TIME")
    if code is status.CANCELLED:
        is_lost = _OWN_DOING.search(said) is None
    else:
        is_vague = code in (status.INTERNAL, status.UNKNOWN, status.UNAVAILABLE)
        is_lost = is_vague and _LOST.search(said) is not None
    failed = _FAILED.fullmatch(said) if code is status.UNAVAILABLE else None
    if is_lost and failed is None:
        return status.UNAVAILABLE, "CONNECTION_LOST", say("CONNECTION_LOST", why=said)
    if code is not status.UNAVAILABLE:
        return code, "", say("NOT_OFFERED") if code is status.UNIMPLEMENTED else said
    if failed is not None:
        place = failed["place"].replace("%5B", "[").replace("%5D", "]")
        for pattern, reason in _ANSWERED.items():
            if re.search(pattern, failed["why"]):
                return code, reason, say(reason, place=place, why=failed["why"])
        return code, "NOT_REACHED", say("NOT_REACHED", place=place, why=failed["why"])
    if found := _UNRESOLVED.match(said):
        return code, "NOT_REACHED", say("NOT_RESOLVED", place=found["place"])
    return code, "NOT_REACHED", say("NOT_ANSWERED", why=said)


_DETAILS_KEY = "grpc-status-details-bin"
_REQUEST_ID_KEY = "x-request-id"
# Reasons whose message only lists which fields are invalid and why.
_REASONS_ABOUT_FIELDS = ("INVALID_REQUEST", "ADAPTER_CLASSIFIES", "HEAD_MISSING")
# Maximum number of fields in a message; ``violations`` has all of them.
_MAX_LISTED = 8
_CLASSES: dict[grpc.StatusCode, type[TurretRpcError]] = {}
# The ``field`` of a violation that only states how many further fields are invalid.
COUNTED = "*"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that the server rejected.

    Attributes:
        field: The argument, or a part of it, such as ``temperature`` or ``messages[0].role``.
        description: What is wrong with it.
        reason: The fault as a code, such as ``TOO_MANY_ENTRIES``; empty if the server sent none.
    """

    field: str
    description: str
    reason: str = ""


class TurretRpcError(Exception):
    """A call that ended with a status other than OK.

    Attributes:
        code: The status.
        message: What went wrong, for people.
        reason: Machine-readable cause in UPPER_SNAKE, such as ``ADAPTER_NOT_FOUND``. The server
            sends it; if no server did, the client sets one, such as ``NOT_REACHED``. Empty if
            neither knows more than the status.
        metadata: Values that the message mentions, by name.
        violations: The invalid fields, if any.
        retry_delay: Seconds to wait before a retry, if the server proposes one.
        request_id: The id under which the server logged the call; empty if unknown.
        place: The thing at fault, such as a line of a file; empty if the caller set none.
    """

    def __init_subclass__(cls, status: grpc.StatusCode | None = None) -> None:
        if status is not None:
            _CLASSES[status] = cls

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        metadata: dict[str, str] | None = None,
        violations: Iterable[FieldViolation] = (),
        retry_delay: float | None = None,
        request_id: str = "",
    ) -> None:
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata = metadata or {}
        self.violations = tuple(violations)
        self.retry_delay = retry_delay
        self.request_id = request_id
        self.place = ""
        super().__init__(message)

    @property
    def hint(self) -> str:
        """Advice in terms of this client; empty if nothing is sure to help."""
        return hint_for(self.reason or self.code.name, self.metadata, HINTS)

    def __str__(self) -> str:
        return self.described(self.hint)

    def described(self, hint: str, name_of: Callable[[str], str] = str) -> str:
        """The error on one line: status, reason, message, and hint.

        Args:
            hint: Advice; empty for none.
            name_of: Renames the fields at fault.
        """
        head = self.code.name
        if self.reason not in ("", head):
            head = f"{head} ({self.reason})"
        said = self.message
        if self.reason in _REASONS_ABOUT_FIELDS and self.violations:
            said = _list_of(self.violations, name_of)
        if self.place:
            said = f"{self.place}: {said}"
        parts = [" ".join(said.split()), hint]
        if self.retry_delay is not None:
            parts.append(f"retry in {self.retry_delay:g} s")
        return f"{head}: " + "; ".join(part for part in parts if part)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy restore the attributes, without calling the class."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    def at(self, place: str) -> Self:
        """A copy of the error with a place before its message."""
        found = copy.copy(self)
        found.place = place
        return found

    @staticmethod
    def from_grpc(error: grpc.RpcError) -> TurretRpcError:
        """Convert gRPC's error, of a synchronous or an asyncio call, to the class of its status."""
        # Every error that grpc raises for a call is also a grpc.Call, but its base class is not.
        code = error.code()  # type: ignore[attr-defined]
        text = error.details() or ""  # type: ignore[attr-defined]
        trailing: dict[str, object] = dict(
            error.trailing_metadata() or ()  # type: ignore[attr-defined]
        )
        reason, metadata, violations, retry_delay = "", {}, [], None
        for detail in _details(trailing.get(_DETAILS_KEY)):
            if isinstance(detail, error_details_pb2.ErrorInfo):
                reason, metadata = detail.reason, dict(detail.metadata)
            elif isinstance(detail, error_details_pb2.BadRequest):
                violations += [
                    FieldViolation(argument(v.field), v.description, v.reason)
                    for v in detail.field_violations
                ]
            else:
                retry_delay = detail.retry_delay.ToTimedelta().total_seconds()
        if not reason:
            code, reason, text = cause_of(code, text)
        elif reason in _REASONS_ABOUT_FIELDS and violations:
            text = _list_of(violations)
        return _CLASSES.get(code, ServerError)(
            code,
            text,
            reason=reason,
            metadata=metadata,
            violations=violations,
            retry_delay=retry_delay,
            request_id=str(trailing.get(_REQUEST_ID_KEY, "")),
        )


def _list_of(violations: Sequence[FieldViolation], name_of: Callable[[str], str] = str) -> str:
    """The invalid fields and their errors, on one line."""
    listed = [v for v in violations if v.field != COUNTED]
    shown = [
        f"{name_of(v.field)}: {v.description}" if v.field else v.description
        for v in listed[:_MAX_LISTED]
    ]
    if len(violations) > len(shown):
        shown.append("and more")
    return "; ".join(shown)


class InvalidArgumentError(TurretRpcError, status=grpc.StatusCode.INVALID_ARGUMENT):
    """A field is outside its documented range, or a checkpoint is rejected; see ``violations``."""


class AuthenticationError(TurretRpcError, status=grpc.StatusCode.UNAUTHENTICATED):
    """The server requires a token, and received none or an unknown one."""


class PermissionDeniedError(TurretRpcError, status=grpc.StatusCode.PERMISSION_DENIED):
    """The token lacks the role that the call needs."""


class NotFoundError(TurretRpcError, status=grpc.StatusCode.NOT_FOUND):
    """No adapter of that name, or of that generation, is registered."""


class AlreadyExistsError(TurretRpcError, status=grpc.StatusCode.ALREADY_EXISTS):
    """The name is taken by other weights."""


class FailedPreconditionError(TurretRpcError, status=grpc.StatusCode.FAILED_PRECONDITION):
    """The state forbids it: an adapter is in use, pinned or for another base; a merge is active."""


class RateLimitedError(TurretRpcError, status=grpc.StatusCode.RESOURCE_EXHAUSTED):
    """A queue or a budget is full. If waiting helps, ``retry_delay`` has the seconds to wait."""


class DeadlineExceededError(TurretRpcError, status=grpc.StatusCode.DEADLINE_EXCEEDED):
    """The deadline, set by the ``timeout`` of the call or its client, passed before the call ended.

    A call that returns a whole answer loses it; a stream has already delivered its chunks.
    """


class AbortedError(TurretRpcError, status=grpc.StatusCode.ABORTED):
    """An adapter of the request was unloaded by force."""


class CallCancelledError(TurretRpcError, status=grpc.StatusCode.CANCELLED):
    """The call was cancelled, or its client closed. Cancelled tasks raise CancelledError."""


class UnavailableError(TurretRpcError, status=grpc.StatusCode.UNAVAILABLE):
    """The server is starting or stopping, could not be reached, or was lost."""

    @property
    def is_lost(self) -> bool:
        """Whether a server had begun the call, and then stopped or vanished."""
        return self.reason == "CONNECTION_LOST"

    @property
    def is_of_server(self) -> bool:
        """Whether a server reported the error before it began the call."""
        return bool(self.reason) and self.reason not in UNREACHED


class AnswerCutError(UnavailableError):
    """A stopping server ended the answer early, and no other server completed it.

    Attributes:
        completion: The part that was generated; None for a stream, which has delivered it already.
    """

    completion: Completion | None = None

    @property
    def is_lost(self) -> bool:
        return True

    @classmethod
    def of(cls, completion: Completion | None) -> AnswerCutError:
        """The error for a partial answer."""
        error = cls(grpc.StatusCode.UNAVAILABLE, say("ANSWER_CUT"), reason="ANSWER_CUT")
        error.completion = completion
        return error


class ServerError(TurretRpcError):
    """Any other error: a bug in the server, or a service that is not at this address.

    In the second case ``reason`` is ``SERVICE_ELSEWHERE``, or empty if the server is not turret.
    """


def _details(payload: object) -> Iterable:
    """The known messages among a status's details; none if the status is unreadable."""
    if not isinstance(payload, bytes):
        return
    known = error_details_pb2
    try:
        for packed in status_pb2.Status.FromString(payload).details:
            for detail in (known.ErrorInfo(), known.BadRequest(), known.RetryInfo()):
                if packed.Unpack(detail):
                    yield detail
    except message.DecodeError:
        # A proxy may have damaged the details. The status itself is still valid.
        return
