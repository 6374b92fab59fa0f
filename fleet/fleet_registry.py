"""The one place that decides what names stand for: it alone assigns uuid and generation.

A state machine without clock, network or thread: every call says what time it is. The registry
writes a change down first, and publishes it under the next *revision*. The caller has its answer
when every living replica has applied that revision. Three mechanisms keep this promise.

*Leases* let a change finish although a replica is silent. A replica counts as living only while its
lease runs, and knows when it ends. With ``stops_alone`` a replica whose lease has lapsed answers
nothing, so no request sees the state before a change that the registry has called done. The
registry waits a little longer than the replica's own clock does (``CLOCK_SLACK``). A *session*
names one joining of a replica: a join or report of an earlier session that arrives late must not
make a replica count as living that has missed a change.

*Incarnations* let the registry crash. A change that was written down but not published is true in
the next incarnation. Revisions start again there, so replicas take a snapshot. Replicas may still
serve what the previous incarnation told them, so the new one calls nothing done until their leases
have lapsed. The id of an operation names its incarnation: a caller whose answer was lost learns
that nobody knows the outcome, and never gets that of another operation.

*Merges have two phases*, because a replica may be unable to make the merged weights (no memory,
values that are not finite), and replicas must never serve different bases. In the first phase every
replica makes the weights beside its own. If one fails, or the caller withdraws, nothing has changed
anywhere. When all have made them, the new base is written down and published, and each replica
exchanges its weights between two steps. A replica that joins later makes the weights before it
serves; one that cannot apply the change ends, and is started again.
"""

from __future__ import annotations

import dataclasses
import uuid as uuids
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, assert_never

from turret.fleet import messages as m
from turret.fleet import rules
from turret.fleet.fleet_state import (
    Base,
    BaseChanged,
    Closed,
    Entry,
    FleetState,
    MergePlan,
    Preparing,
    Registered,
    Removed,
    key_of,
    usable_base,
)
from turret.fleet.members import CLOCK_SLACK, LivingReplica, Members
from turret.server.adapters.source import Source
from turret.server.adapters.state.saved_registration import SavedRegistration
from turret.server.errors import NotMergedError, TurretError, UnavailableError

# A replica that is further behind gets a snapshot instead.
_LOG_ENTRIES = 10_000
# At least this many recent outcomes are kept for callers that have yet to ask.
_KEPT = 4096

Stage = Literal["applying", "draining", "preparing", "done"]


class Store(Protocol):
    """State that survives the registry. A call that raises changes nothing; see ``FleetStore``."""

    def bind(self, base_name: str, base_digest: str) -> None: ...
    def read(self) -> list[SavedRegistration]: ...
    def read_base(self) -> Base: ...
    def save(self, saved: SavedRegistration) -> None: ...
    def remove(self, name: str) -> None: ...
    def save_base(self, base: Base) -> None: ...
    def adopt(self, source: Source, key: str) -> Source: ...
    def discard(self, source: Source) -> None: ...


@dataclass(slots=True)
class Operation:
    """One accepted proposal.

    Attributes:
        id: The caller asks by it; no other incarnation makes the same.
        stage: ``draining`` waits for requests to end, ``preparing`` for merged weights to be made,
            ``applying`` for the revision to be true on every living replica.
        revision: The last one that it has committed.
        outcome: What the caller gets.
        error: What the caller gets instead.
        unload: What the caller of an unload said, and the registration that it meant.
        deadline: When an unload gives up; None is never.
    """

    id: str
    stage: Stage
    revision: int
    outcome: m.Outcome = field(default_factory=m.Outcome)
    error: TurretError | None = None
    unload: tuple[m.Unload, SavedRegistration] | None = None
    deadline: float | None = None

    def end(self, error: TurretError | None = None) -> None:
        self.stage, self.error = "done", error


@dataclass(frozen=True, slots=True)
class Leftover:
    """Files of a generation that is gone, to be removed when nobody reads them any more."""

    key: str
    source: Source
    revision: int


class Operations:
    """All operations of one incarnation of the registry."""

    def __init__(self, incarnation: str) -> None:
        self._incarnation = incarnation
        self._next = 1
        self._by_id: dict[str, Operation] = {}

    def add(self, stage: Stage, revision: int, **fields: object) -> Operation:
        operation = Operation(f"{self._incarnation}.{self._next}", stage, revision, **fields)  # type: ignore[arg-type]
        self._by_id[operation.id] = operation
        self._next += 1
        if len(self._by_id) > 2 * _KEPT:
            for old in [o for o in self._by_id.values() if o.stage == "done"][:_KEPT]:
                del self._by_id[old.id]
        return operation

    def find(self, name: str) -> Operation:
        """An operation.

        Raises:
            UnavailableError: It was another incarnation's: whether it took effect is not known.
        """
        if name not in self._by_id:
            raise UnavailableError(
                "the fleet's registry was started anew meanwhile; look whether the change was made"
            )
        return self._by_id[name]

    def open(self, stage: Stage) -> Iterator[Operation]:
        """The operations in a stage."""
        return (o for o in list(self._by_id.values()) if o.stage == stage)


class FleetRegistry:
    """One incarnation. Not thread-safe.

    Args:
        store: What survives.
        now: The time.
        lease_seconds: How long a silent replica is waited for.
        is_first: Nobody follows another incarnation any more. If not, replicas may still serve
            what that one said, so that for the length of a lease nothing is said to be done.
        new_uuid: Makes names that are never made again.
    """

    def __init__(
        self,
        store: Store,
        *,
        now: float,
        lease_seconds: float = 5.0,
        is_first: bool = True,
        new_uuid: Callable[[], str] = lambda: uuids.uuid4().hex,
    ) -> None:
        self._store = store
        self._new_uuid = new_uuid
        self.incarnation = new_uuid()
        self.revision = 0
        names = {saved.name: saved for saved in store.read()}
        self.state = FleetState(names, base=usable_base(store.read_base(), names))
        self.members = Members(lease_seconds)
        self._log: deque[tuple[int, Entry]] = deque(maxlen=_LOG_ENTRIES)
        self._operations = Operations(self.incarnation)
        self._leftovers: list[Leftover] = []
        self._quiet_until = now if is_first else now + lease_seconds * CLOCK_SLACK

    # Replicas

    def join(self, join: m.Join, now: float) -> m.Joined:
        """Registers a replica as living, and returns the whole state.

        Raises:
            ValueError: Its base model is another one.
        """
        self._store.bind(join.base_name, join.base_digest)
        session = self.members.join(join.replica, now)
        return m.Joined(
            incarnation=self.incarnation,
            session=session,
            revision=self.revision,
            state=self.state.copy(),
            lease_seconds=self.members.lease_seconds,
        )

    def report(self, report: m.Report, now: float) -> m.News:
        """Takes in a replica's report, and returns what is new for it.

        Raises:
            NotJoinedError: It was silent for too long, follows another incarnation, or is further
                behind than the log goes back.
        """
        oldest = self._log[0][0] if self._log else self.revision + 1
        if report.incarnation != self.incarnation or report.received < oldest - 1:
            raise m.NotJoinedError(report.replica)
        if not self.members.renew(report, now):
            raise m.NotJoinedError(report.replica)
        self.tick(now)
        first = len(self._log) - (self.revision - report.received)
        entries = tuple(self._log[index] for index in range(max(first, 0), len(self._log)))
        return m.News(entries=entries, lease_seconds=self.members.lease_seconds)

    def leave(self, replica: str, now: float) -> None:
        """Removes a replica that stops and answers no more calls."""
        self.members.leave(replica)
        self.tick(now)

    def usage(self, name: str = "") -> Mapping[str, Mapping[str, m.Usage]]:
        """The usage that each replica last reported, of one name or of all."""
        if not name:
            return {replica.name: replica.usage for replica in self.members}
        return {r.name: {name: r.usage[name]} for r in self.members if name in r.usage}

    def status(self, now: float) -> m.FleetStatus:
        """The whole fleet, for an operator."""
        self.members.expire(now)
        return m.FleetStatus(
            incarnation=self.incarnation,
            revision=self.revision,
            num_adapters=len(self.state.names),
            base=self.state.base,
            replicas=tuple(member.status(now) for member in self.members),
        )

    # Callers

    def submit(self, proposal: m.Proposal, now: float) -> str:
        """Accepts a proposal; ``outcome`` returns its result.

        Raises:
            TurretError: It is refused, and nothing has changed. The classes are those of
                ``AdapterRegistry`` and ``Merger``.
        """
        self.tick(now)
        match proposal:
            case m.Register():
                operation = self._register(proposal)
            case m.Pin():
                operation = self._pin(proposal)
            case m.Unload():
                operation = self._unload(proposal, now)
            case m.Merge():
                operation = self._merge(proposal)
            case m.Unmerge():
                operation = self._unmerge()
            case _:
                assert_never(proposal)
        self.tick(now)
        return operation.id

    def outcome(self, operation: str, now: float) -> m.Outcome | None:
        """The result of a proposal; None while it is open.

        Raises:
            TurretError: It came to nothing.
            UnavailableError: It was made to another incarnation.
        """
        self.tick(now)
        found = self._operations.find(operation)
        if found.stage != "done":
            return None
        if found.error is not None:
            raise found.error
        return found.outcome

    def cancel(self, operation: str, error: TurretError, now: float) -> None:
        """Withdraws a merge while some replica still prepares its weights; else does nothing."""
        found = self._operations.find(operation)
        if found.stage == "preparing":
            self._abandon(found, error)
        self.tick(now)

    def tick(self, now: float) -> None:
        """Advances all operations that can continue; call it regularly."""
        self.members.expire(now)
        for operation in self._operations.open("preparing"):
            self._go_on_preparing(operation, now)
        for operation in self._operations.open("draining"):
            self._go_on_draining(operation, now)
        for operation in self._operations.open("applying"):
            if self._is_applied(operation.revision, now):
                operation.end()
        self._discard_leftovers(now)

    # Weights

    def _register(self, proposal: m.Register) -> Operation:
        name, facts = proposal.name, proposal.facts
        rules.check_open(self.state, name)
        before = self.state.names.get(name)
        if proposal.replaces is not None:
            before = rules.registered(self.state, name)
            rules.check_same(before, proposal.replaces)
        elif before is not None:
            rules.check_free(before, facts)
        if before is not None and before.facts.digest == facts.digest:
            return self._confirm(before, proposal)
        rules.check_components(self.state, name, facts)
        if before is None:
            uuid, generation = self._new_uuid(), 1
        else:
            rules.check_not_needed(self.state, before)
            uuid, generation = before.uuid, before.generation + 1
        saved = SavedRegistration(
            name=name,
            uuid=uuid,
            generation=generation,
            pinned=proposal.pinned or (before is not None and before.pinned),
            source=proposal.source,
            facts=facts,
        )
        saved = self._save_new(saved, before, proposal.is_staged)
        self._publish(Registered(saved))
        if before is not None:
            self._leave_over(before)
        return self._applying(m.Outcome(saved=saved))

    def _save_new(
        self, saved: SavedRegistration, before: SavedRegistration | None, is_staged: bool
    ) -> SavedRegistration:
        """Saves the files first and the registration last; a failure leaves all as it was."""
        if is_staged:
            saved = dataclasses.replace(
                saved, source=self._store.adopt(saved.source, key_of(saved))
            )
        try:
            self._store.save(saved)
        except TurretError:
            if is_staged:
                self._store.discard(saved.source)
            if before is not None:
                self._store.save(before)
            raise
        return saved

    def _confirm(self, before: SavedRegistration, proposal: m.Register) -> Operation:
        """The content is registered already, from this or another place."""
        source = before.source
        if not (proposal.is_staged or source.is_upload):
            # The new source is known to hold the content; the old path may be gone.
            source = proposal.source
        after = dataclasses.replace(before, source=source, pinned=before.pinned or proposal.pinned)
        return self._change(before, after)

    def _pin(self, proposal: m.Pin) -> Operation:
        before = rules.registered(self.state, proposal.name)
        rules.check_open(self.state, proposal.name)
        return self._change(before, dataclasses.replace(before, pinned=proposal.pinned))

    def _change(self, before: SavedRegistration, after: SavedRegistration) -> Operation:
        if after != before:
            self._store.save(after)
            self._publish(Registered(after))
        return self._applying(m.Outcome(saved=after))

    # The end of a name

    def _unload(self, proposal: m.Unload, now: float) -> Operation:
        saved = rules.registered(self.state, proposal.name)
        rules.check_generation(saved, proposal.expected_generation)
        rules.check_unpinned(saved)
        rules.check_not_needed(self.state, saved)
        is_forced = proposal.is_forced or self.state.closed.get(saved.name, False)
        if self.state.closed.get(saved.name) != is_forced:
            self._publish(Closed(saved.name, saved.uuid, is_forced))
        seconds = proposal.timeout_seconds
        return self._operations.add(
            "draining",
            self.revision,
            unload=(proposal, saved),
            deadline=None if seconds is None else now + seconds,
        )

    def _go_on_draining(self, operation: Operation, now: float) -> None:
        assert operation.unload is not None
        proposal, saved = operation.unload
        current = self.state.names.get(saved.name)
        if current is None or current.uuid != saved.uuid:
            # Another unload has already removed it.
            operation.stage, operation.revision = "applying", self.revision
            return
        held = self.members.held(saved.uuid)
        if held == 0 and self._is_applied(operation.revision, now):
            try:
                self._store.remove(saved.name)
            except TurretError as error:
                self._reopen(operation, current, error)
                return
            self._publish(Removed(saved.name, saved.uuid))
            self._leave_over(current)
            operation.stage, operation.revision = "applying", self.revision
        elif operation.deadline is not None and now >= operation.deadline:
            self._reopen(operation, current, rules.still_held(saved, held, proposal))

    def _reopen(self, operation: Operation, saved: SavedRegistration, error: TurretError) -> None:
        operation.end(error)
        others = self._operations.open("draining")
        if not any(o.unload is not None and o.unload[1].uuid == saved.uuid for o in others):
            self._publish(Registered(saved))

    # The base

    def _merge(self, proposal: m.Merge) -> Operation:
        rules.check_no_merge(self.state)
        rules.check_members(self.state, proposal.members)
        plan = MergePlan(
            uuid=self._new_uuid(),
            members=proposal.members,
            precision=proposal.precision,
            time=proposal.time,
        )
        self._publish(Preparing(plan))
        return self._operations.add("preparing", self.revision)

    def _go_on_preparing(self, operation: Operation, now: float) -> None:
        plan = self.state.preparing
        assert plan is not None
        answers = [_answer(member, plan) for member in self.members]
        failed = [error for is_made, error in answers if is_made and error is not None]
        if failed:
            self._abandon(operation, failed[0])
            return
        everywhere = all(is_made for is_made, _ in answers)
        if everywhere and answers and self._is_applied(operation.revision, now):
            base = Base(generation=self.state.base.generation + 1, merge=plan)
            try:
                self._change_base(base)
            except TurretError as error:
                self._abandon(operation, error)
                return
            operation.stage, operation.revision = "applying", self.revision
            operation.outcome = m.Outcome(base=base)

    def _abandon(self, operation: Operation, error: TurretError) -> None:
        self._publish(Preparing(None))
        operation.end(error)

    def _unmerge(self) -> Operation:
        if self.state.preparing is not None:
            rules.check_no_merge(self.state)
        if self.state.base.merge is None:
            raise NotMergedError("no merge is active: the base is as it was loaded")
        base = Base(generation=self.state.base.generation + 1)
        self._change_base(base)
        return self._applying(m.Outcome(base=base))

    def _change_base(self, base: Base) -> None:
        self._store.save_base(base)
        self._publish(BaseChanged(base))

    # The log

    def _publish(self, entry: Entry) -> None:
        self.state.apply(entry)
        self.revision += 1
        self._log.append((self.revision, entry))

    def _applying(self, outcome: m.Outcome) -> Operation:
        return self._operations.add("applying", self.revision, outcome=outcome)

    def _is_applied(self, revision: int, now: float) -> bool:
        return now >= self._quiet_until and self.members.have_applied(revision)

    def _leave_over(self, saved: SavedRegistration) -> None:
        if saved.source.is_upload:
            self._leftovers.append(Leftover(key_of(saved), saved.source, self.revision))

    def _discard_leftovers(self, now: float) -> None:
        kept: list[Leftover] = []
        for leftover in self._leftovers:
            is_free = self._is_applied(leftover.revision, now)
            if is_free and not self.members.is_held(leftover.key):
                self._store.discard(leftover.source)
            else:
                kept.append(leftover)
        self._leftovers = kept


def _answer(member: LivingReplica, plan: MergePlan) -> tuple[bool, TurretError | None]:
    """A replica's result of preparing a merge's weights, and its error if it failed."""
    prepared = {} if member.report is None else member.report.prepared
    return plan.uuid in prepared, prepared.get(plan.uuid)
