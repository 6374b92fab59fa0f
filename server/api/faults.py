"""Errors as clients see them: a code, a message, and when to try again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from turret.server.basics.codes import Code
from turret.server.basics.work import turret_error
from turret.server.words import say

# The latest calls that failed, over any protocol, for operators who watch the server.

MAX_FAILURES = 50
# The message may repeat what the client sent, so keep only as much as explains the failure.
MAX_MESSAGE_CHARS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failed call.

    Attributes:
        method: The method, as the log shows it.
        protocol: ``grpc`` or ``http``.
        request_id: The id in the log lines of the call.
        code: Name of the code that the call ended with.
        reason: A constant for programs, such as ``ADAPTER_NOT_FOUND``.
        message: The message for the client.
        adapters: The names of the call's adapters, if they were known.
        time: When the call ended, in Unix seconds.
    """

    method: str
    protocol: str
    request_id: str
    code: str
    reason: str
    message: str
    adapters: tuple[str, ...] = ()
    time: float = field(default_factory=time.time)


class Failures:
    """Keeps the last ``MAX_FAILURES``. Belongs to one event loop."""

    def __init__(self) -> None:
        self._kept: deque[Failure] = deque(maxlen=MAX_FAILURES)

    def add(self, failure: Failure) -> None:
        """Add a failure; the oldest is dropped when there are too many."""
        self._kept.append(failure)

    def newest(self) -> list[Failure]:
        """The failures that are kept, the newest first."""
        return list(reversed(self._kept))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An error as clients see it.

    Attributes:
        code: The code of the error.
        reason: A constant for programs, such as ``ADAPTER_NOT_FOUND``.
        message: The message for people. If it is a sentence of the catalogue, it is a ``Text`` with
            its own reason and parameters, and so is each description.
        metadata: Names and numbers that the message contains.
        violations: ``(field path, description)`` of each invalid field of the request.
        retry_after_seconds: When to try again; None if that would not help.
    """

    code: Code
    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: tuple[tuple[str, str], ...] = ()
    retry_after_seconds: float | None = None


def fault_of(error: BaseException) -> Fault:
    """The part of an error that clients may know.

    An error that turret did not raise on purpose becomes INTERNAL, unless it reports a lack of
    memory. Its text may contain anything, so clients do not get it, and the caller must log it.
    """
    found = turret_error(error)
    if found.code is Code.INTERNAL:
        return Fault(code=Code.INTERNAL, reason="INTERNAL", message=say("INTERNAL"))
    return Fault(
        code=found.code,
        reason=found.reason,
        message=found.message,
        metadata=found.metadata,
        violations=found.violations,
        retry_after_seconds=found.retry_after_seconds,
    )
