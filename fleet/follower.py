"""A replica's side: it takes what the registry says in order, and says how far it is.

A state machine without clock, network or thread: every call says what time it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from turret.fleet.fleet_state import Entry, FleetState
from turret.fleet.messages import Join, Joined, News, Report, Usage
from turret.server.errors import TurretError


class Applies(Protocol):
    """Applies the fleet's state to the replica; see ``ReplicaRegistry``."""

    def reset(self, state: FleetState) -> None: ...
    def apply(self, entry: Entry) -> None: ...
    def holding(self) -> Mapping[str, int]: ...
    def prepared(self) -> Mapping[str, TurretError | None]: ...
    def usage(self) -> Mapping[str, Usage]: ...
    def num_requests(self) -> tuple[int, int]: ...


@dataclass(frozen=True, slots=True)
class Change:
    """The next change to apply.

    Attributes:
        session: The incarnation of the registry and the replica's session whose revision it is.
        revision: The one that is true afterwards.
        what: A snapshot, or what changed.
    """

    session: tuple[str, int]
    revision: int
    what: FleetState | Entry


class Follower:
    """Not thread-safe. ``Applies`` may take long, and runs between two calls.

    Args:
        join: Who the replica is.
        replica: Makes changes true.
        stops_alone: Serve nothing while the lease has lapsed. Without it a replica that hears
            nothing of the registry goes on with what it knows: exact under each generation that
            it names, but perhaps behind a change that the others have made.
    """

    def __init__(self, join: Join, replica: Applies, *, stops_alone: bool = False) -> None:
        self._join = join
        self._replica = replica
        self._stops_alone = stops_alone
        # The registry's incarnation and this replica's session there; None if it must join.
        self._session: tuple[str, int] | None = None
        self._received = -1
        self._applied = -1
        self._must_apply = 0
        self._told_usage: Mapping[str, Usage] | None = None
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
            incarnation=self._session[0],
            session=self._session[1],
            received=self._received,
            applied=applied,
            holding=self._replica.holding(),
            prepared=self._replica.prepared(),
            usage=None if usage is self._told_usage else usage,
            waiting=waiting,
            running=running,
        )

    def joined(self, answer: Joined, asked: float) -> None:
        """Takes in the snapshot requested at that time; an older one is ignored."""
        if asked <= self._joined_at:
            return
        self._joined_at = asked
        self._session = session = (answer.incarnation, answer.session)
        self._received = self._must_apply = answer.revision
        self._applied = -1
        self._told_usage = None
        self._lease_until = asked + answer.lease_seconds
        self._changes.clear()
        self._changes.append(Change(session, answer.revision, answer.state))

    def told(self, call: Report, news: News, asked: float) -> None:
        """Takes in the answer to a report; a late or repeated one is ignored."""
        session = self._session
        if session is None or session != (call.incarnation, call.session):
            return
        if call.usage is not None:
            self._told_usage = call.usage
        self._lease_until = max(self._lease_until, asked + news.lease_seconds)
        for revision, entry in news.entries:
            if revision == self._received + 1:
                self._received = revision
                self._changes.append(Change(session, revision, entry))

    def must_join(self, call: Report) -> None:
        """Records that the registry does not know the replica, or no longer does."""
        if self._session == (call.incarnation, call.session):
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
        """Whether everything is applied that was true when the replica last joined."""
        return self._session is not None and self._applied >= self._must_apply

    def has_lease(self, now: float) -> bool:
        """Whether the registry waits for this replica before it reports a change as made."""
        return now < self._lease_until

    def is_serving(self, now: float) -> bool:
        """Whether requests may be answered."""
        if self._stops_alone:
            return self.is_current and self.has_lease(now)
        return self._has_served
