"""The last calls that failed, through whichever door, for those who watch the server."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

MAX_FAILURES = 50
# Enough to tell what happened; a message repeats what the client sent.
MAX_MESSAGE_CHARS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One of them.

    Attributes:
        method: What was called, as the log shows it.
        protocol: The door: ``grpc`` or ``http``.
        request_id: The lines of the log that belong to it carry it.
        code: Name of the code that the call ended with.
        reason: A constant for programs, such as ``ADAPTER_NOT_FOUND``.
        message: What the client was told.
        adapters: Names that the call was about, as far as they were known.
        time: When it ended, Unix seconds.
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
        """Take one in; the oldest goes when there are too many."""
        self._kept.append(failure)

    def newest(self) -> list[Failure]:
        """Those that are kept, the newest first."""
        return list(reversed(self._kept))
