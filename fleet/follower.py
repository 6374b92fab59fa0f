"""A replica's side of the fleet: applies the registry's changes in order and reports progress.

``Follower`` is a state machine without clock, network or thread: its methods take the time as an
argument. ``ReplicaLink`` runs it: one thread asks for changes, another applies them.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from turret.fleet import protocol as p
from turret.fleet.protocol import AdapterUsage, Entry, FleetState, Join, Joined, News, Report
from turret.fleet.words import say
from turret.server import log
from turret.server.basics.work import Cancellation
from turret.server.errors import TurretError, UnavailableError

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5
# Without news, the registry answers a report after a third of a lease, so that two reports may be
# lost before the lease expires.
_WAITS_PER_LEASE = 3
# Interval of reports while requests hold a generation that was replaced or is being unloaded.
_DRAIN_SECONDS = 0.05
_WAIT_SECONDS = 2.0
# Merges check for cancellation more often, because their callers may disconnect.
_CANCEL_SECONDS = 0.2


class Channel(ABC):
    """The methods of a ``FleetRegistry`` that may be in another process. Each blocks.

    Every method raises UnavailableError if the registry cannot be reached; whether a proposal was
    accepted is then not known.
    """

    @abstractmethod
    def call(self, wait_seconds: float, method: str, *arguments: Any) -> Any:
        """Calls a method of the registry, which adds the time as the last argument.

        ``report`` waits up to ``wait_seconds`` for news, and ``outcome`` for the outcome.
        """

    def join(self, join: p.Join) -> p.Joined:
        return self.call(0.0, "join", join)

    def report(self, report: p.Report, wait_seconds: float) -> p.News:
        return self.call(wait_seconds, "report", report)

    def submit(self, proposal: p.Proposal) -> str:
        return self.call(0.0, "submit", proposal)

    def outcome(self, operation: str, wait_seconds: float) -> p.Outcome | None:
        return self.call(wait_seconds, "outcome", operation)

    def cancel(self, operation: str, error: TurretError) -> None:
        self.call(0.0, "cancel", operation, error)

    def leave(self, replica: str) -> None:
        self.call(0.0, "leave", replica)

    def usage(self) -> Mapping[str, Mapping[str, p.AdapterUsage]]:
        return self.call(0.0, "usage")

    def status(self) -> p.FleetStatus:
        return self.call(0.0, "status")


def propose(
    channel: Channel, proposal: p.Proposal, cancellation: Cancellation | None = None
) -> p.Outcome:
    """Proposes a change and waits until every living replica has applied it.

    Args:
        channel: The connection to the registry.
        proposal: The change.
        cancellation: Set when the caller no longer waits. A merge whose weights are still being
            prepared is then withdrawn.

    Raises:
        TurretError: The change was rejected or failed.
        UnavailableError: The registry cannot be reached, or was restarted meanwhile.
    """
    operation = channel.submit(proposal)
    is_withdrawn = False
    while True:
        if cancellation is not None and cancellation.is_set and not is_withdrawn:
            is_withdrawn = True
            try:
                cancellation.check()
            except TurretError as error:
                channel.cancel(operation, error)
        seconds = _WAIT_SECONDS if cancellation is None else _CANCEL_SECONDS
        outcome = channel.outcome(operation, seconds)
        if outcome is not None:
            return outcome


class Applies(Protocol):
    """Applies the fleet's state to the replica; see ``ReplicaParts``."""

    def reset(self, state: FleetState) -> None:
        """Applies a snapshot of the whole state; blocks."""

    def apply(self, entry: Entry) -> None:
        """Applies one change of the state; blocks."""

    def holding(self) -> Mapping[str, int]:
        """The number of requests on each generation that is replaced or being unloaded, by key."""
        ...

    def prepared(self) -> Mapping[str, TurretError | None]:
        """The merge plan whose preparation has ended, with its error or None."""
        ...

    def usage(self) -> Mapping[str, AdapterUsage]:
        """The adapters in memory or in use, by name; the same object while nothing changes."""
        ...

    def num_requests(self) -> tuple[int, int]:
        """The numbers of waiting and of running requests."""
        ...


@dataclass(frozen=True, slots=True)
class Change:
    """The next change to apply.

    Attributes:
        session: The session that the revision belongs to.
        revision: The revision that the replica has reached afterwards.
        what: A snapshot of the whole state, or one change of it.
    """

    session: str
    revision: int
    what: FleetState | Entry


class Follower:
    """Tracks which changes a replica has received and applied.

    Not thread-safe, except that ``apply``, which may take long, may run during other calls.

    Args:
        join: Identifies the replica.
        replica: Applies the changes.
        stops_alone: Whether the replica stops serving when its lease has expired. If False, a
            replica that cannot reach the registry continues with the state that it has. Answers
            are exact for the generation that they report, but it may be an old one.
    """

    def __init__(self, join: Join, replica: Applies, *, stops_alone: bool = False) -> None:
        self._join = join
        self._replica = replica
        self._stops_alone = stops_alone
        # The session is None while the replica must join.
        self._session: str | None = None
        self._received = -1
        self._applied = -1
        self._must_apply = 0
        self._reported_usage: Mapping[str, AdapterUsage] | None = None
        self._lease_until = self._joined_at = float("-inf")
        self._has_served = False
        self._changes: deque[Change] = deque()

    def next_call(self) -> Join | Report:
        """The next message to the registry."""
        if self._session is None:
            return self._join
        # Read the progress first: the usage is then at least as recent.
        applied = self._applied
        usage = self._replica.usage()
        waiting, running = self._replica.num_requests()
        return Report(
            replica=self._join.replica,
            session=self._session,
            received=self._received,
            applied=applied,
            holding=self._replica.holding(),
            prepared=self._replica.prepared(),
            usage=None if usage is self._reported_usage else usage,
            waiting=waiting,
            running=running,
        )

    def joined(self, answer: Joined, asked: float) -> None:
        """Records the snapshot that was requested at the time ``asked``; ignores an older one."""
        if asked <= self._joined_at:
            return
        self._joined_at = asked
        self._session = session = answer.session
        self._received = self._must_apply = answer.revision
        self._applied = -1
        self._reported_usage = None
        self._lease_until = asked + answer.lease_seconds
        self._changes.clear()
        self._changes.append(Change(session, answer.revision, answer.state))

    def take_news(self, call: Report, news: News, asked: float) -> None:
        """Records the answer to a report; ignores a late or repeated one."""
        session = self._session
        if session is None or session != call.session:
            return
        if call.usage is not None:
            self._reported_usage = call.usage
        self._lease_until = max(self._lease_until, asked + news.lease_seconds)
        for revision, entry in news.entries:
            if revision == self._received + 1:
                self._received = revision
                self._changes.append(Change(session, revision, entry))

    def must_join(self) -> None:
        """Records that the registry does not know the replica, or no longer does."""
        self._session = None

    def next_change(self) -> Change | None:
        """The change for ``apply``; None if there is none."""
        return self._changes.popleft() if self._changes else None

    def apply(self, change: Change) -> None:
        """Applies a change; blocks. Call ``done`` afterwards."""
        if isinstance(change.what, FleetState):
            self._replica.reset(change.what)
        else:
            self._replica.apply(change.what)

    def done(self, change: Change) -> None:
        """Records that a change is applied."""
        if change.session == self._session and change.revision > self._applied:
            self._applied = change.revision
            self._has_served = self._has_served or self.is_current

    @property
    def is_current(self) -> bool:
        """Whether the replica has applied the state that it got when it last joined."""
        return self._session is not None and self._applied >= self._must_apply

    def has_lease(self, now: float) -> bool:
        """Whether the registry waits for this replica before it reports a change as made."""
        return now < self._lease_until

    def is_serving(self, now: float) -> bool:
        """Whether requests may be answered."""
        if self._stops_alone:
            return self.is_current and self.has_lease(now)
        return self._has_served


class ReplicaLink:
    """Connects a replica to the registry: runs a ``Follower`` on two threads.

    Args:
        join: Identifies the replica.
        replica: Applies the changes.
        channel: The connection to the registry.
        stops_alone: See ``Follower``.
    """

    def __init__(
        self,
        join: Join,
        replica: Applies,
        channel: Channel,
        *,
        stops_alone: bool = False,
    ) -> None:
        self._name = join.replica
        self._replica = replica
        self._channel = channel
        self._follower = Follower(join, replica, stops_alone=stops_alone)
        self._changed = threading.Condition()
        self._lease_seconds = 1.0
        self._is_closed = False
        self._error: Exception | None = None
        self._is_away = False

    def start(self, timeout_seconds: float) -> None:
        """Joins the fleet, and blocks until the registry's state is applied.

        Raises:
            UnavailableError: The registry was not reached in time.
            TurretError, ValueError: The state cannot be applied, or the registry rejects the
                replica.
        """
        for work in (self._watch, self._apply):
            threading.Thread(target=work, name=f"fleet {work.__name__}", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._error or self.is_serving, timeout_seconds)
            if self._error is not None:
                raise self._error
            if not self.is_serving:
                raise UnavailableError(say("REGISTRY_AWAY"))

    def close(self) -> None:
        """Leaves the fleet, so that the registry no longer waits for this replica."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        try:
            self._channel.leave(self._name)
        except UnavailableError:
            return

    @property
    def is_serving(self) -> bool:
        """Whether requests may be answered."""
        return self._error is None and self._follower.is_serving(time.monotonic())

    @property
    def has_failed(self) -> bool:
        """Whether a change cannot be applied here, so that the replica must end."""
        return self._error is not None

    def report_soon(self) -> None:
        """Triggers the next report."""
        threading.Thread(target=self._ask, args=(0.0,), name="fleet report", daemon=True).start()

    def _watch(self) -> None:
        while not self._is_closed and self._error is None:
            with self._changed:
                is_busy = bool(self._replica.holding())
            wait = _DRAIN_SECONDS if is_busy else self._lease_seconds / _WAITS_PER_LEASE
            if not self._ask(wait):
                time.sleep(_RETRY_SECONDS)

    def _ask(self, wait_seconds: float) -> bool:
        """Makes one call to the registry; False if it failed."""
        with self._changed:
            question, asked = self._follower.next_call(), time.monotonic()
        try:
            if isinstance(question, Join):
                joined = self._channel.join(question)
                with self._changed:
                    self._follower.joined(joined, asked)
                    self._lease_seconds = joined.lease_seconds
                    self._changed.notify_all()
            else:
                news = self._channel.report(question, wait_seconds)
                self._take(question, news, asked)
        except p.NotJoinedError:
            with self._changed:
                self._follower.must_join()
        except UnavailableError as error:
            if not self._is_away:
                self._is_away = True
                _log.warning("the registry cannot be reached", extra=log.fields(reason=error))
            return False
        except ValueError as error:
            self._fail(error)
            return False
        if self._is_away:
            self._is_away = False
            _log.info("the registry can be reached again")
        return True

    def _take(self, question: Report, news: News, asked: float) -> None:
        with self._changed:
            self._follower.take_news(question, news, asked)
            self._changed.notify_all()

    def _apply(self) -> None:
        while True:
            with self._changed:
                while (change := self._follower.next_change()) is None:
                    if self._is_closed or self._error is not None:
                        return
                    self._changed.wait()
            try:
                self._follower.apply(change)
            except Exception as error:
                _log.exception("the replica cannot apply the fleet's changes")
                self._fail(error)
                return
            with self._changed:
                self._follower.done(change)
                self._changed.notify_all()
            # Report at once, because callers wait for it.
            self._ask(0.0)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
