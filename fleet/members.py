"""The replicas that the registry counts as living."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from turret.fleet.messages import ReplicaStatus, Report, Usage

# A replica's lease starts, by the replica's clock, when it asks. The registry waits longer, from
# when the question arrives, because clocks may run at different speeds.
CLOCK_SLACK = 1.25


@dataclass(slots=True)
class LivingReplica:
    """One replica, according to the latest news from it.

    Attributes:
        session: Which of its joinings counts. A join that comes late makes it living without its
            knowing that it was not, and that changes were said to be made without it.
    """

    name: str
    expires: float
    session: int
    applied: int = -1
    report: Report | None = None
    usage: Mapping[str, Usage] = field(default_factory=dict)

    def held(self, uuid: str) -> int:
        """Requests on it that hold any generation of a registration."""
        holding = {} if self.report is None else self.report.holding
        return sum(count for key, count in holding.items() if key.rpartition(".")[0] == uuid)

    def status(self, now: float) -> ReplicaStatus:
        """The replica's status, for an operator."""
        usage = list(self.usage.values())
        return ReplicaStatus(
            name=self.name,
            revision=self.applied,
            lease_seconds=max(self.expires - now, 0.0),
            running=0 if self.report is None else self.report.running,
            waiting=0 if self.report is None else self.report.waiting,
            num_host=sum(each.residency != "disk" for each in usage),
            num_device=sum(each.residency == "device" for each in usage),
        )


class Members:
    """Leases. All times must be of one clock.

    Args:
        lease_seconds: How long a replica that says nothing counts as living.
    """

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._by_name: dict[str, LivingReplica] = {}
        self._num_sessions = 0

    def __iter__(self) -> Iterator[LivingReplica]:
        return iter(self._by_name.values())

    def join(self, name: str, now: float) -> int:
        """Adds a replica that has applied nothing yet; returns its session."""
        self._num_sessions += 1
        self._by_name[name] = LivingReplica(name, self._expiry(now), self._num_sessions)
        return self._num_sessions

    def renew(self, report: Report, now: float) -> bool:
        """Takes in a report; False if its session is not that of a living replica."""
        member = self._by_name.get(report.replica)
        if member is None or member.session != report.session:
            return False
        member.expires = self._expiry(now)
        if report.usage is not None:
            member.usage = report.usage
        # Reports may arrive out of order.
        if member.report is None or report.applied >= member.applied:
            member.applied, member.report = report.applied, report
        return True

    def leave(self, name: str) -> None:
        """Forgets a replica that stops."""
        self._by_name.pop(name, None)

    def expire(self, now: float) -> None:
        """Forgets replicas whose lease has ended."""
        for member in [member for member in self if member.expires <= now]:
            del self._by_name[member.name]

    def have_applied(self, revision: int) -> bool:
        """Whether every living replica has applied a revision."""
        return all(member.applied >= revision for member in self)

    def held(self, uuid: str) -> int:
        """Requests on all replicas that hold a registration."""
        return sum(member.held(uuid) for member in self)

    def is_held(self, key: str) -> bool:
        """Whether any replica holds a generation, or has not reported yet."""
        return any(member.report is None or key in member.report.holding for member in self)

    def _expiry(self, now: float) -> float:
        return now + self.lease_seconds * CLOCK_SLACK
