"""What a failed call raises: a class for each kind, with the details that the server sent.

TurretRpcError
├── InvalidArgumentError      a field breaks its documented range, or a checkpoint is refused
├── AuthenticationError       no token, or an unknown one
├── PermissionDeniedError     the token lacks the role
├── NotFoundError             no adapter of that name (or generation)
├── AlreadyExistsError        the name is taken by other weights
├── FailedPreconditionError   not as things are: in use, pinned, another base, a merge is active
├── RateLimitedError          a queue or a budget is full; ``retry_delay`` may say how long
├── DeadlineExceededError     the deadline passed first
├── AbortedError              the adapter was unloaded by force meanwhile
├── CallCancelledError        the call was cancelled, or its client closed
├── UnavailableError          no server, or one that starts or stops
│   └── AnswerCutError        a server that stops ended an answer before its end
└── ServerError               anything else: a fault of the server, a service of another address
"""

from __future__ import annotations

import copyreg
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import grpc
from google.protobuf import message
from google.rpc import error_details_pb2, status_pb2

from turret.clients.messages.argument_names import argument, in_arguments
from turret.clients.messages.results import Completion
from turret.clients.unreached import broken, is_broken, why_unreached

_DETAILS_KEY = "grpc-status-details-bin"
_REQUEST_ID_KEY = "x-request-id"
# Fields that a message names; ``violations`` has all.
_MOST_TOLD = 8


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that the server refused.

    Attributes:
        field: The argument, and what in it, such as ``temperature`` or ``messages[0].role``.
        description: What is wrong with it.
    """

    field: str
    description: str


class TurretRpcError(Exception):
    """A call that ended with another status than OK.

    Attributes:
        code: The status.
        message: The server's text, or gRPC's own if the server was not reached.
        reason: Machine-readable cause in UPPER_SNAKE, such as ``ADAPTER_NOT_FOUND``; empty if the
            error is gRPC's own.
        metadata: Values that the message mentions, by name.
        violations: The fields to blame, if any.
        retry_delay: Seconds to wait before a retry, if the server proposes one.
        request_id: The id under which the server logged the call; empty if unknown.
    """

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
        super().__init__(self._describe())

    def _describe(self) -> str:
        """One line: status, reason, message, and what the message leaves out."""
        is_told = self.reason in ("", self.code.name)
        head = self.code.name if is_told else f"{self.code.name} ({self.reason})"
        parts = [" ".join(self.message.split())]
        # Of an adapter's many faults the message is a summary already; a star stands for fields
        # that the server only counts.
        is_summary = self.reason.startswith("ADAPTER_")
        untold = [
            v
            for v in self.violations
            if not is_summary and v.field != "*" and v.description not in self.message
        ]
        parts += [f"{v.field}: {v.description}" for v in untold[:_MOST_TOLD]]
        if len(untold) > _MOST_TOLD:
            parts.append(f"and {len(untold) - _MOST_TOLD} more, see violations")
        if self.retry_delay is not None:
            parts.append(f"retry in {self.retry_delay:g} s")
        return f"{head}: " + "; ".join(part for part in parts if part)

    def __reduce__(self) -> tuple[Any, ...]:
        """As pickle and copy make it again: by its attributes, not by a call of the class."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    def at(self, place: str) -> Self:
        """The same error with the place that it concerns in front of its message."""
        return self.with_message(f"{place}: {self.message}")

    def with_message(self, message: str, *, step: tuple[str, str] = ("", "")) -> Self:
        """The same error in other words; ``step`` is exchanged in its violations: old and new."""
        old, new = step
        violations = self.violations
        if old:
            violations = tuple(
                FieldViolation(v.field, v.description.replace(old, new)) for v in violations
            )
        return type(self)(
            self.code,
            message,
            reason=self.reason,
            metadata=self.metadata,
            violations=violations,
            retry_delay=self.retry_delay,
            request_id=self.request_id,
        )

    @staticmethod
    def from_grpc(error: grpc.RpcError) -> TurretRpcError:
        """Convert gRPC's error, of a synchronous or an asyncio call, to the class of its status."""
        # Every error that grpc raises for a call is also a grpc.Call; its base class is not.
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
                fields = [violation.field for violation in detail.field_violations]
                text = in_arguments(text, fields)
                violations += [
                    FieldViolation(argument(v.field), in_arguments(v.description, ()))
                    for v in detail.field_violations
                ]
            else:
                retry_delay = detail.retry_delay.ToTimedelta().total_seconds()
        if not reason and _is_lost(code, text):
            code, text = grpc.StatusCode.UNAVAILABLE, broken(text)
        elif not reason and (found := _TOO_LARGE.search(text)):
            code = grpc.StatusCode.INVALID_ARGUMENT
            text = _too_large(found)
        elif not reason:
            text = _plain(code, text)
        elif reason == "ADAPTER_NOT_FOUND" and not _is_step_told(text):
            text += LISTED
        elif reason == "ADAPTER_EXISTS":
            text = text.replace(*_REPLACES)
        elif code is grpc.StatusCode.UNAUTHENTICATED:
            text += TOKEN
        elif reason == "SERVICE_ELSEWHERE":
            text += ELSEWHERE
        elif code is grpc.StatusCode.UNAVAILABLE and text.startswith(_STARTING):
            text += LOADING
        return _CLASSES.get(code, ServerError)(
            code,
            text,
            reason=reason,
            metadata=metadata,
            violations=violations,
            retry_delay=retry_delay,
            request_id=str(trailing.get(_REQUEST_ID_KEY, "")),
        )


class InvalidArgumentError(TurretRpcError):
    """A field breaks its documented range, or a checkpoint is refused; see ``violations``."""


class AuthenticationError(TurretRpcError):
    """The server wants a token, and got none or an unknown one."""


class PermissionDeniedError(TurretRpcError):
    """The token lacks the role that the call needs."""


class NotFoundError(TurretRpcError):
    """No adapter of that name, or of that generation, is registered."""


class AlreadyExistsError(TurretRpcError):
    """The name is taken by other weights."""


class FailedPreconditionError(TurretRpcError):
    """Not as things are: an adapter in use, pinned, or made for another base; an active merge."""


class RateLimitedError(TurretRpcError):
    """A queue or a budget is full; where waiting helps, ``retry_delay`` says how long."""


class DeadlineExceededError(TurretRpcError):
    """The deadline passed before the call's end; ``timeout`` of a call or its client sets it.

    Of an answer that was asked for as a whole nothing is left; a stream has given its chunks.
    """


class AbortedError(TurretRpcError):
    """An adapter of the request was unloaded by force meanwhile."""


class CallCancelledError(TurretRpcError):
    """The call was cancelled, or its client closed. A task that is cancelled has none of these."""


class UnavailableError(TurretRpcError):
    """A server that is starting or stopping; without ``reason``, none was reached, or it was lost.

    A connection that broke, a proxy's word that it did included, is this too.
    """

    @property
    def is_lost(self) -> bool:
        """Whether a server had begun with the call and is gone, or stops."""
        return not self.reason and is_broken(self.message)

    @classmethod
    def made_here(cls, message: str) -> Self:
        """One that no status tells."""
        return cls(grpc.StatusCode.UNAVAILABLE, message)


class AnswerCutError(UnavailableError):
    """A server that stops has ended an answer before its end, and none has given all of it.

    Attributes:
        completion: What it had generated; None of a stream, whose last chunk was the last of it.
    """

    completion: Completion | None = None

    @property
    def is_lost(self) -> bool:
        return True

    @classmethod
    def of(cls, completion: Completion | None) -> AnswerCutError:
        """The error for what had been generated."""
        error = cls.made_here(
            "the server is shutting down: it ended the answer before its end; ask again"
        )
        error.completion = completion
        return error


class ServerError(TurretRpcError):
    """Anything else: a fault of the server, or a service that is not at this address.

    The latter has the ``reason`` ``SERVICE_ELSEWHERE``, or none if the server is not turret's.
    """


_CLASSES: dict[grpc.StatusCode, type[TurretRpcError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RateLimitedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
}


# What to do about a name that is not there and looks like none that is.
LISTED = "; adapters.list() tells which there are, adapters.load() registers one"
# About a token that is missing or wrong.
TOKEN = "; TurretClient(token=...) sends one"
# And about one that is none of the server's.
UNKNOWN_TOKEN = "; what was given is not in the file that the server's --token-file names"
# About a deadline that passed, as gRPC and the server say it, and what allowed so little.
DEADLINES = ("no answer in time", "the deadline passed before the request finished")
DEADLINE = ": timeout="
# And about a call at the address of another service.
ELSEWHERE = "; a client takes both: address= and admin_address="
# And about a name that has other weights: the server's words, and what a program calls.
_REPLACES = ("replace or unload it", "call adapters.replace(), or adapters.unload() first")
# And about a server that loads its model: the tries of a client are over in seconds.
_STARTING = "the server is starting"
LOADING = "; `turret health --wait 600` returns when it serves, a larger max_retries= waits for it"


def _is_step_told(text: str) -> bool:
    return "did you mean" in text or "the current one" in text


# What gRPC says when the caller itself has ended a call.
_OWN_DOING = ("Locally cancelled", "Channel closed", "Channel is closed")
# What it says when the other end, or a proxy before it, has gone without a status.
_LOST = (
    "RST_STREAM",
    "Stream removed",
    "GOAWAY",
    "Connection reset",
    "Socket closed",
    # HAProxy's, when the server that it has just chosen is gone.
    "http2 header with status: 500",
)


def _is_lost(code: grpc.StatusCode, text: str) -> bool:
    """Whether a status that no server set says that the connection broke."""
    if code is grpc.StatusCode.CANCELLED:
        return not any(words in text for words in _OWN_DOING)
    is_vague = code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    return is_vague and any(words in text for words in _LOST)


# gRPC's words for a server that is not there: twice that it failed, and its form of the address.
_UNREACHED = re.compile(
    r"failed to connect to all addresses; last error: [A-Z_]+: (?:ipv[46]:)?(?P<place>.*?):"
    r" (?:Failed to connect to remote host: )?(?P<why>.*)",
    re.DOTALL,
)
_UNRESOLVED = re.compile(r"errors resolving (?P<place>\S+): \[")


# gRPC's words where one end takes no message as large as the other has sent.
_TOO_LARGE = re.compile(
    r"(?P<end>SERVER: |CLIENT: )?Received message larger than max \((\d+) vs\. (\d+)\)"
)


def _too_large(found: re.Match[str]) -> str:
    """What a message was too large for, and what to do."""
    size, most = int(found[2]), int(found[3])
    if found["end"] == "CLIENT: ":
        return (
            f"the answer is {size} bytes long, and this client takes at most {most}: ask for less"
            " of it (top_n, logprobs), or for fewer inputs in a call"
        )
    return (
        f"the request is {size} bytes long, and the server takes at most {most}: shorten the"
        " prompt, give it as token ids, or spread several inputs over several calls"
    )


def _plain(code: grpc.StatusCode, text: str) -> str:
    """What gRPC itself says of a call, once and in words."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DEADLINES[0]
    if found := _UNREACHED.fullmatch(text):
        place = found["place"].replace("%5B", "[").replace("%5D", "]")
        return why_unreached(place, found["why"])
    if found := _UNRESOLVED.match(text):
        port = found["place"].rpartition(":")[2]
        of_port = "" if port.isdigit() else f", or {port!r} is no port"
        return why_unreached(found["place"], f"its name has no address{of_port}")
    if code is grpc.StatusCode.UNAVAILABLE and any(words in text for words in _LOST):
        return broken(text)
    return text


def _details(payload: object) -> Iterable:
    """The known messages among a status's details; none if there is no readable status."""
    if not isinstance(payload, bytes):
        return
    status = status_pb2.Status()
    kinds = (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.RetryInfo,
    )
    try:
        status.ParseFromString(payload)
        for any_detail in status.details:
            for kind in kinds:
                detail = kind()
                if any_detail.Unpack(detail):
                    yield detail
    except message.DecodeError:
        # A proxy may have garbled the details; the status itself still stands.
        return
