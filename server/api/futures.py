"""Results that clients fetch later, and the order in which a model's commands run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from pydantic_core import to_json

from turret.server.api.call import fault_of
from turret.server.basics.codes import Code
from turret.server.errors import InvalidRequestError, QueueFullError, TurretError, UnavailableError
from turret.server.words import say

_log = logging.getLogger(__name__)

# How long a result is kept, and how long after it was fetched, in case the response was lost.
RESULT_SECONDS = 600.0
FETCHED_SECONDS = 60.0
# Limits on one owner's results. The oldest finished ones are evicted first.
MAX_FUTURES = 4096
MAX_RESULT_BYTES = 64 << 20
# Limits on waiting commands per model, and on the bytes of their bodies per owner.
MAX_COMMANDS = 1024
MAX_WAITING_BYTES = 64 << 20
# A command that is still missing after this time will not arrive: clients retry for five minutes.
GAP_SECONDS = 330.0
_JSON = "application/json"

# Codes of failures that the client caused.
_BY_CLIENT = frozenset(
    (
        *(Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.ALREADY_EXISTS, Code.PERMISSION_DENIED),
        *(Code.FAILED_PRECONDITION, Code.OUT_OF_RANGE, Code.UNIMPLEMENTED),
    )
)


@dataclass(frozen=True, slots=True)
class Result:
    """The body of a result, and its media type."""

    body: bytes
    kind: str = _JSON

    @classmethod
    def of(cls, **fields: object) -> Result:
        """A JSON object without the fields that are None."""
        given = {name: value for name, value in fields.items() if value is not None}
        return cls(to_json(given, inf_nan_mode="null"))

    @classmethod
    def failed(cls, error: BaseException) -> Result:
        """The failure that an error causes."""
        fault = fault_of(error)
        if fault.code is Code.INTERNAL:
            _log.error("internal error", exc_info=error)
        category = "user" if fault.code in _BY_CLIENT else "server"
        return cls.of(error=fault.message, category=category)


@dataclass(slots=True, eq=False)
class Future:
    """A result that may not exist yet.

    Attributes:
        request_id: The id by which the client fetches the result.
        owner: The client that may fetch it.
        result: The result; None until it exists.
        error: The error behind a result that is a failure.
        expires: The time on the monotonic clock at which a result is dropped.
        task: The work on the result, if that can be cancelled.
        sequence_ids: The ids of the sequences that are being sampled.
    """

    request_id: str
    owner: str
    result: Result | None = None
    error: BaseException | None = None
    expires: float = 0.0
    task: asyncio.Task[None] | None = None
    sequence_ids: list[str] | None = None
    _done: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self, seconds: float) -> Result | None:
        """The result; None if it does not arrive in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._done.wait()
        return self.result

    def cancel(self) -> None:
        """Cancel the work on the result, if that is possible."""
        if self.task is not None:
            # Cancel the task only after its first step: a task that is cancelled before it never
            # runs, and so would not release what it holds.
            asyncio.get_running_loop().call_soon(self.task.cancel)

    def fetched(self) -> None:
        """Keep the result only a little longer."""
        self.expires = min(self.expires, time.monotonic() + FETCHED_SECONDS)


class Futures:
    """All futures. Use an instance on one event loop only."""

    def __init__(self) -> None:
        # Futures by id, the oldest first.
        self._all: dict[str, Future] = {}
        self._bytes: Counter[str] = Counter()
        self._count: Counter[str] = Counter()

    def find(self, owner: str, request_id: str) -> Future | None:
        """A future of an owner; None if it does not exist or its result was dropped."""
        found = self._all.get(request_id)
        return found if found is not None and found.owner == owner else None

    def begin(self, owner: str, request_id: str) -> Future:
        """A new future.

        Raises:
            QueueFullError: The owner has too many futures without a result.
        """
        if self._count[owner] >= MAX_FUTURES and not self._drop_oldest(owner):
            raise QueueFullError(say("TRAINING_LIMIT_REACHED", most=MAX_FUTURES, what="requests"))
        future = self._all[request_id] = Future(request_id, owner)
        self._count[owner] += 1
        return future

    def settle(self, future: Future, result: Result) -> None:
        """Set the result, unless there is one."""
        if future.result is not None:
            return
        future.result = result
        future.expires = time.monotonic() + RESULT_SECONDS
        future.task = None
        future._done.set()
        if future.request_id not in self._all:
            return
        self._bytes[future.owner] += len(result.body)
        while self._bytes[future.owner] > MAX_RESULT_BYTES:
            if not self._drop_oldest(future.owner, keep=future):
                break

    def fail(self, future: Future, error: BaseException) -> None:
        """Set the failure that an error causes."""
        result = Result.failed(error)
        # The frames of tracebacks hold the body of the request, so drop them.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        if future.result is None:
            future.error = error
        self.settle(future, result)

    def forget(self, future: Future) -> None:
        """Drop a future whose result needs no second fetch."""
        if self._all.get(future.request_id) is future and future.result is not None:
            self._drop(future)

    def sweep(self) -> None:
        """Drop expired results."""
        now = time.monotonic()
        for future in [each for each in self._all.values() if each.result is not None]:
            if future.expires <= now:
                self._drop(future)

    def _drop_oldest(self, owner: str, keep: Future | None = None) -> bool:
        """Drop the owner's oldest result; returns whether there was one."""
        for future in self._all.values():
            if future.owner == owner and future.result is not None and future is not keep:
                self._drop(future)
                return True
        return False

    def _drop(self, future: Future) -> None:
        del self._all[future.request_id]
        assert future.result is not None
        for counter, change in ((self._count, 1), (self._bytes, len(future.result.body))):
            counter[future.owner] -= change
            if not counter[future.owner]:
                del counter[future.owner]


Run = Callable[[], Awaitable[Result]]


@dataclass(frozen=True, slots=True)
class _Command:
    future: Future
    run: Run
    size: int
    arrived: float


class CommandLog:
    """The commands of one model. They run one at a time, in the order of their numbers.

    Commands may arrive in any order. Each number runs once.

    Args:
        futures: Takes the results.
        waiting_bytes: Bytes of waiting commands by owner, over all models.
    """

    def __init__(self, futures: Futures, waiting_bytes: Counter[str]) -> None:
        self._futures = futures
        self._bytes = waiting_bytes
        self._next = 0
        self._waiting: dict[int, _Command] = {}
        self._worker: asyncio.Task[None] | None = None

    @property
    def next_number(self) -> int:
        """The number of the next command, for clients that do not number theirs."""
        return max(self._waiting, default=self._next - 1) + 1

    def is_past(self, number: int) -> bool:
        """Whether the command with this number has started or been abandoned."""
        return number < self._next

    def add(self, number: int, owner: str, request_id: str, run: Run, size: int = 0) -> Future:
        """Add a command whose number has neither run nor been added.

        Args:
            number: The number.
            owner: The client.
            request_id: The id of the result's future.
            run: Does the work. An exception becomes the failure.
            size: Size of the data that the command holds until it has run, in bytes.

        Raises:
            QueueFullError: Too many commands wait. The next command is always accepted, because
                others wait for it.
        """
        assert number >= self._next, "a command that is past"
        is_next = number == self._next
        is_full = len(self._waiting) >= MAX_COMMANDS
        if not is_next and (is_full or self._bytes[owner] + size > MAX_WAITING_BYTES):
            raise QueueFullError(say("COMMANDS_WAITING", most=MAX_COMMANDS))
        future = self._futures.begin(owner, request_id)
        self._waiting[number] = _Command(future, run, size, time.monotonic())
        self._bytes[owner] += size
        if is_next and self._worker is None:
            self._worker = asyncio.ensure_future(self._run())
        return future

    def give_up(self) -> None:
        """If a command has not arrived for too long, fail those that wait for it."""
        if self._worker is not None or not self._waiting:
            return
        if min(each.arrived for each in self._waiting.values()) > time.monotonic() - GAP_SECONDS:
            return
        missing = self._next
        self._next = max(self._waiting) + 1
        self._fail(InvalidRequestError(say("COMMAND_MISSING", number=missing)))

    def abandon(self) -> None:
        """Fail the waiting commands."""
        self._fail(UnavailableError(say("TRAINING_ENDED")))

    async def close(self) -> None:
        """Wait for the command that runs, once the waiting ones are abandoned."""
        if self._worker is not None:
            await asyncio.wait([self._worker])

    async def _run(self) -> None:
        try:
            while (command := self._waiting.pop(self._next, None)) is not None:
                self._next += 1
                try:
                    self._futures.settle(command.future, await command.run())
                except Exception as error:
                    self._futures.fail(command.future, error)
                finally:
                    self._release(command)
                # Drop the command, whose data may be large, before the next one runs.
                del command
        finally:
            self._worker = None

    def _fail(self, error: TurretError) -> None:
        for command in self._waiting.values():
            self._futures.fail(command.future, error)
            self._release(command)
        self._waiting.clear()

    def _release(self, command: _Command) -> None:
        owner = command.future.owner
        self._bytes[owner] -= command.size
        if not self._bytes[owner]:
            del self._bytes[owner]
