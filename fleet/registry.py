"""The fleet's registry of names: the only place that assigns uuids and generations.

The registry is a state machine without clock, network or thread: its methods take the time as an
argument. It saves a change first, and publishes it under the next *revision*. It answers the caller
once every living replica has applied that revision. tests/fleet/test_fleet_histories.py shows what
can go wrong meanwhile.
"""

from __future__ import annotations

import dataclasses
import logging
import uuid as uuids
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, assert_never

from turret.fleet import protocol as p
from turret.fleet.protocol import (
    AliasEntry,
    BaseEntry,
    FleetBase,
    FleetState,
    NameEntry,
    generations_of,
    key_of,
)
from turret.fleet.words import say
from turret.server import log
from turret.server.adapters.adapter import (
    AdapterFacts,
    Alias,
    AliasTarget,
    Source,
    check_alias,
    check_no_target,
    kept_generations,
)
from turret.server.adapters.state_dir import SavedGeneration, SavedRegistration
from turret.server.errors import (
    AdapterBusyError,
    AdapterComponentError,
    AdapterExistsError,
    AdapterGenerationError,
    AdapterInUseError,
    AdapterMergedError,
    AdapterNotFoundError,
    AdapterPinnedError,
    InvalidRequestError,
    MergeActiveError,
    MergeUnderWayError,
    NotMergedError,
    TurretError,
    UnavailableError,
)

# A replica counts its lease from when it sends a report, the registry from when the report arrives.
# The registry also waits longer by this factor, because clocks may run at different speeds.
CLOCK_SLACK = 1.25
# Length of the log of changes. A replica that is further behind gets a snapshot instead.
_LOG_ENTRIES = 10_000
# Minimum number of recent outcomes that are kept for callers that have yet to ask for them.
_KEPT = 4096

_log = logging.getLogger(__name__)

ProposalStage = Literal["applying", "draining", "preparing", "done"]


class Store(Protocol):
    """State that survives a restart. A call that raises changes nothing; see ``FleetStore``."""

    def bind(self, base_name: str, base_digest: str) -> None: ...
    def read(self, *, sweeps: bool) -> list[SavedRegistration]: ...
    def read_base(self) -> FleetBase: ...
    def write(self, saved: SavedRegistration) -> None: ...
    def remove(self, name: str) -> None: ...
    def read_aliases(self) -> list[Alias]: ...
    def save_alias(self, alias: Alias) -> None: ...
    def remove_alias(self, name: str) -> None: ...
    def write_base(self, base: FleetBase) -> None: ...
    def keep(self, source: Source, key: str) -> Source: ...
    def discard(self, source: Source) -> None: ...


@dataclass(slots=True)
class LivingReplica:
    """A replica that holds a lease, as its latest report describes it."""

    name: str
    session: str
    expires: float
    report: p.Report
    usage: Mapping[str, p.AdapterUsage] = field(default_factory=dict)

    def status(self, now: float) -> p.ReplicaStatus:
        usage = list(self.usage.values())
        return p.ReplicaStatus(
            name=self.name,
            revision=self.report.applied,
            lease_seconds=max(self.expires - now, 0.0),
            running=self.report.running,
            waiting=self.report.waiting,
            num_host=sum(each.residency != "disk" for each in usage),
            num_device=sum(each.residency == "device" for each in usage),
        )


@dataclass(slots=True)
class Operation:
    """One accepted proposal.

    Attributes:
        id: Identifies the operation, across all runs of the registry.
        stage: ``draining`` waits for requests to end, ``preparing`` for replicas to compute merged
            weights, ``applying`` for every living replica to apply the revision.
        revision: The last revision that the operation has published.
        outcome: The outcome for the caller.
        error: The error for the caller, in place of an outcome.
        unload: The proposal of an unload, and the registration that it refers to.
        deadline: When an unload gives up; None means never.
    """

    id: str
    stage: ProposalStage
    revision: int
    outcome: p.Outcome = field(default_factory=p.Outcome)
    error: TurretError | None = None
    unload: tuple[p.Unload, SavedRegistration] | None = None
    deadline: float | None = None

    def end(self, error: TurretError | None = None) -> None:
        self.stage, self.error = "done", error


class FleetRegistry:
    """One run of the registry. Not thread-safe.

    Args:
        store: The state that survives a restart.
        now: The current time.
        lease_seconds: How long the registry waits for a silent replica.
        is_first: Whether no replica follows an earlier run any more. If False, replicas may still
            serve that run's state, so no change is reported as done for the length of a lease.
        new_uuid: Returns a new unique id.
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
        self._lease_seconds = lease_seconds
        self.revision = 0
        names = {saved.name: saved for saved in store.read(sweeps=is_first)}
        aliases = {alias.name: alias for alias in _usable_aliases(store.read_aliases(), names)}
        self.state = FleetState(names, aliases, base=_usable_base(store.read_base(), names))
        self._keep_generations = 0
        self._living: dict[str, LivingReplica] = {}
        self._log: deque[tuple[int, p.Entry]] = deque(maxlen=_LOG_ENTRIES)
        self._operations: dict[str, Operation] = {}
        # The files and key of uploaded generations that are gone, with the revision that removed
        # each. The files are deleted once no replica uses them.
        self._leftovers: list[tuple[Source, str, int]] = []
        # Until this time, replicas that follow an earlier run may still answer requests.
        self._quiet_until = now if is_first else self._expiry(now)

    # Replicas

    def join(self, join: p.Join, now: float) -> p.Joined:
        """Registers a replica as living, and returns the whole state.

        Raises:
            ValueError: The replica serves another base model.
        """
        self._store.bind(join.base_name, join.base_digest)
        self._keep_generations = join.keep_generations
        session = self._new_uuid()
        nothing = p.Report(replica=join.replica, session=session, received=-1, applied=-1)
        self._living[join.replica] = LivingReplica(
            join.replica, session, self._expiry(now), nothing
        )
        return p.Joined(
            session=session,
            revision=self.revision,
            state=self.state.copy(),
            lease_seconds=self._lease_seconds,
        )

    def report(self, report: p.Report, now: float) -> p.News:
        """Records a replica's report, and returns the changes that the replica lacks.

        Raises:
            NotJoinedError: The replica was silent for too long, joined an earlier run, or lacks
                changes that are no longer in the log.
        """
        living = self._reporting(report)
        living.expires = self._expiry(now)
        if report.usage is not None:
            living.usage = report.usage
        living.report = report
        self.tick(now)
        return self.news(report)

    def news(self, report: p.Report) -> p.News:
        """The changes that the replica of an earlier report lacks; errors as for ``report``."""
        self._reporting(report)
        first = len(self._log) - (self.revision - report.received)
        entries = tuple(self._log[index] for index in range(max(first, 0), len(self._log)))
        return p.News(entries=entries, lease_seconds=self._lease_seconds)

    def _reporting(self, report: p.Report) -> LivingReplica:
        living = self._living.get(report.replica)
        # The first revision in the log: the replica must have received all the earlier ones.
        oldest = self._log[0][0] if self._log else self.revision + 1
        is_known = living is not None and living.session == report.session
        if living is None or not is_known or report.received < oldest - 1:
            raise p.NotJoinedError(report.replica)
        return living

    def leave(self, replica: str, now: float) -> None:
        """Removes a replica that is stopping and answers no more calls."""
        self._living.pop(replica, None)
        self.tick(now)

    def usage(self, now: float) -> Mapping[str, Mapping[str, p.AdapterUsage]]:
        """The usage that each living replica last reported, by the adapter's name."""
        self._expire(now)
        return {replica.name: replica.usage for replica in self._living.values()}

    def status(self, now: float) -> p.FleetStatus:
        """The whole fleet, for an operator."""
        self._expire(now)
        return p.FleetStatus(
            revision=self.revision,
            num_adapters=len(self.state.names),
            base=self.state.base,
            replicas=tuple(living.status(now) for living in self._living.values()),
        )

    def _expiry(self, now: float) -> float:
        return now + self._lease_seconds * CLOCK_SLACK

    def _expire(self, now: float) -> None:
        self._living = {name: r for name, r in self._living.items() if r.expires > now}

    def _is_applied(self, revision: int, now: float) -> bool:
        """Whether every replica that may answer requests has applied a revision."""
        is_everywhere = all(r.report.applied >= revision for r in self._living.values())
        return now >= self._quiet_until and is_everywhere

    def _held(self, uuid: str) -> int:
        """The number of requests, on all replicas, that hold a generation of a registration."""
        holding = [item for r in self._living.values() for item in r.report.holding.items()]
        return sum(count for key, count in holding if key.rpartition(".")[0] == uuid)

    def _is_held(self, key: str) -> bool:
        """Whether any replica holds a generation."""
        return any(key in r.report.holding for r in self._living.values())

    # Callers

    def submit(self, proposal: p.Proposal, now: float) -> str:
        """Accepts a proposal; ``outcome`` returns its result.

        Raises:
            TurretError: The proposal is rejected, and nothing has changed. The classes are those
                of ``AdapterRegistry`` and ``Merger``.
        """
        self.tick(now)
        match proposal:
            case p.Register():
                operation = self._register(proposal)
            case p.Rollback():
                operation = self._roll_back(proposal)
            case p.SetAlias():
                operation = self._set_alias(Alias(proposal.name, proposal.targets))
            case p.DeleteAlias():
                operation = self._delete_alias(proposal.name)
            case p.Pin():
                operation = self._pin(proposal)
            case p.Unload():
                operation = self._unload(proposal, now)
            case p.Merge():
                operation = self._merge(proposal)
            case p.Unmerge():
                operation = self._unmerge()
            case _:
                assert_never(proposal)
        self.tick(now)
        return operation.id

    def outcome(self, operation: str, now: float) -> p.Outcome | None:
        """The result of a proposal; None while it is open.

        Raises:
            TurretError: The change failed.
            UnavailableError: The proposal was made to an earlier run of the registry.
        """
        self.tick(now)
        found = self._find(operation)
        if found.stage != "done":
            return None
        if found.error is not None:
            raise found.error
        return found.outcome

    def cancel(self, operation: str, error: TurretError, now: float) -> None:
        """Withdraws a merge whose weights are still being prepared; otherwise does nothing."""
        found = self._find(operation)
        if found.stage == "preparing":
            self._abandon(found, error)
        self.tick(now)

    def tick(self, now: float) -> None:
        """Advances all operations that can continue; call it regularly."""
        self._expire(now)
        for operation in self._in_stage("preparing"):
            self._go_on_preparing(operation, now)
        for operation in self._in_stage("draining"):
            self._go_on_draining(operation, now)
        for operation in self._in_stage("applying"):
            if self._is_applied(operation.revision, now):
                operation.end()
        self._discard_leftovers(now)

    def _begin(self, operation: Operation) -> Operation:
        self._operations[operation.id] = operation
        if len(self._operations) > 2 * _KEPT:
            for old in [o for o in self._operations.values() if o.stage == "done"][:_KEPT]:
                del self._operations[old.id]
        return operation

    def _applying(self, outcome: p.Outcome) -> Operation:
        return self._begin(Operation(self._new_uuid(), "applying", self.revision, outcome))

    def _find(self, operation: str) -> Operation:
        if operation not in self._operations:
            raise UnavailableError(say("REGISTRY_RESTARTED"))
        return self._operations[operation]

    def _in_stage(self, stage: ProposalStage) -> Iterator[Operation]:
        return (o for o in list(self._operations.values()) if o.stage == stage)

    def _publish(self, entry: p.Entry) -> None:
        self.state.apply(entry)
        self.revision += 1
        self._log.append((self.revision, entry))

    # Registering

    def _register(self, proposal: p.Register) -> Operation:
        name, facts = proposal.name, proposal.facts
        self._check_open(name)
        if name in self.state.aliases:
            raise InvalidRequestError.of("name", say("NAME_OF_ALIAS", value=name))
        before = self.state.names.get(name)
        if proposal.replaces is not None:
            before = self._registered(name)
            _check_same(before, proposal.replaces)
        if before is not None and before.facts.content == facts.content:
            return self._confirm(before, proposal)
        if before is not None and proposal.replaces is None:
            taken = say("ADAPTER_EXISTS", adapter=name, digest=before.facts.digest)
            raise AdapterExistsError(taken)
        self._check_components(name, facts)
        if before is None:
            saved = SavedRegistration(
                name=name,
                uuid=self._new_uuid(),
                generation=1,
                pinned=proposal.pinned,
                source=proposal.source,
                facts=facts,
            )
        else:
            self._check_not_needed(before)
            last = max(each.generation for each in generations_of(before))
            new = SavedGeneration(generation=last + 1, source=proposal.source, facts=facts)
            saved = self._next(before, new)
            saved = dataclasses.replace(saved, pinned=proposal.pinned or before.pinned)
        saved = self._save_new(saved, proposal.is_staged)
        self._publish(NameEntry(name, saved))
        if before is not None:
            self._leave_over(before, saved)
        return self._applying(p.Outcome(saved=saved))

    def _roll_back(self, proposal: p.Rollback) -> Operation:
        name = proposal.name
        self._check_open(name)
        before = self._registered(name)
        _check_same(before, proposal.replaces)
        self._check_not_needed(before)
        return self._change(before, self._next(before, _generation(before, proposal.generation)))

    def _next(self, before: SavedRegistration, new: SavedGeneration) -> SavedRegistration:
        """The registration in which another generation is current."""
        current, *kept = generations_of(before)
        replaced = [*(each for each in kept if each is not new), current]
        return dataclasses.replace(
            before,
            generation=new.generation,
            source=new.source,
            facts=new.facts,
            kept=self._kept(before.name, new, replaced),
        )

    def _kept(
        self, name: str, current: SavedGeneration, replaced: list[SavedGeneration]
    ) -> tuple[SavedGeneration, ...]:
        aliases = self.state.aliases.values()
        return kept_generations(name, current, replaced, self._keep_generations, aliases)

    def _save_new(self, saved: SavedRegistration, is_staged: bool) -> SavedRegistration:
        """Saves the files first and the registration last; a failure changes nothing."""
        if is_staged:
            source = self._store.keep(saved.source, key_of(saved))
            saved = dataclasses.replace(saved, source=source)
        try:
            self._store.write(saved)
        except TurretError:
            if is_staged:
                self._store.discard(saved.source)
            raise
        return saved

    def _confirm(self, before: SavedRegistration, proposal: p.Register) -> Operation:
        """Updates the source and pin of a registration that already has the proposed content."""
        source = before.source
        if not (proposal.is_staged or source.is_upload):
            # The new source is known to hold the content; the old path may be gone.
            source = proposal.source
        after = dataclasses.replace(before, source=source, pinned=before.pinned or proposal.pinned)
        return self._change(before, after)

    def _pin(self, proposal: p.Pin) -> Operation:
        before = self._registered(proposal.name)
        self._check_open(proposal.name)
        return self._change(before, dataclasses.replace(before, pinned=proposal.pinned))

    def _change(self, before: SavedRegistration, after: SavedRegistration) -> Operation:
        if after != before:
            self._store.write(after)
            self._publish(NameEntry(after.name, after))
            self._leave_over(before, after)
        return self._applying(p.Outcome(saved=after))

    # Aliases

    def _set_alias(self, alias: Alias) -> Operation:
        for target in alias.targets:
            self._check_target(target)
        check_alias(alias, self.state.aliases, is_adapter=alias.name in self.state.names)
        before = self.state.aliases.get(alias.name)
        if alias != before:
            self._store.save_alias(alias)
            self._publish(AliasEntry(alias.name, alias))
        if before is not None:
            self._drop_surplus(before)
        return self._applying(p.Outcome(alias=alias))

    def _delete_alias(self, name: str) -> Operation:
        if name not in self.state.aliases:
            raise AdapterNotFoundError(say("NOT_AN_ALIAS", alias=name))
        before = self.state.aliases[name]
        self._store.remove_alias(name)
        self._publish(AliasEntry(name))
        self._drop_surplus(before)
        return self._applying(p.Outcome())

    def _drop_surplus(self, alias: Alias) -> None:
        """Drops generations that were kept only for this former alias."""
        for name in sorted({target.name for target in alias.targets}):
            if self._is_in_base(name):
                # The first replacement after the merge ends drops these generations.
                continue
            before = self.state.names[name]
            current, *replaced = generations_of(before)
            after = dataclasses.replace(before, kept=self._kept(name, current, replaced))
            try:
                self._change(before, after)
            except TurretError as error:
                # The next replacement drops these generations.
                said = log.fields(adapter=name, reason=error)
                _log.warning("cannot drop kept generations", extra=said)

    # Unloading

    def _unload(self, proposal: p.Unload, now: float) -> Operation:
        saved = self._registered(proposal.name)
        _check_generation(saved, proposal.expected_generation)
        if saved.pinned:
            raise AdapterPinnedError(say("ADAPTER_PINNED", adapter=saved.name))
        self._check_not_needed(saved)
        check_no_target(saved.name, self.state.aliases.values())
        is_forced = proposal.is_forced or self.state.closed.get(saved.name, False)
        if self.state.closed.get(saved.name) != is_forced:
            self._publish(NameEntry(saved.name, saved, is_forced))
        seconds = proposal.timeout_seconds
        deadline = None if seconds is None else now + seconds
        operation = Operation(self._new_uuid(), "draining", self.revision, deadline=deadline)
        operation.unload = (proposal, saved)
        return self._begin(operation)

    def _go_on_draining(self, operation: Operation, now: float) -> None:
        assert operation.unload is not None
        proposal, saved = operation.unload
        current = self.state.names.get(saved.name)
        if current is None or current.uuid != saved.uuid:
            # Another unload has already removed the adapter.
            operation.stage, operation.revision = "applying", self.revision
            return
        held = self._held(saved.uuid)
        if held == 0 and self._is_applied(operation.revision, now):
            try:
                self._store.remove(saved.name)
            except TurretError as error:
                self._reopen(operation, current, error)
                return
            self._publish(NameEntry(saved.name))
            self._leave_over(current, None)
            operation.stage, operation.revision = "applying", self.revision
        elif operation.deadline is not None and now >= operation.deadline:
            kind = AdapterInUseError if proposal.is_forced else AdapterBusyError
            seconds = proposal.timeout_seconds
            why = say("ADAPTER_HELD", adapter=saved.name, requests=held, seconds=seconds)
            self._reopen(operation, current, kind(why))

    def _reopen(self, operation: Operation, saved: SavedRegistration, error: TurretError) -> None:
        operation.end(error)
        others = self._in_stage("draining")
        if not any(o.unload is not None and o.unload[1].uuid == saved.uuid for o in others):
            self._publish(NameEntry(saved.name, saved))

    def _leave_over(self, before: SavedRegistration, after: SavedRegistration | None) -> None:
        """Lists uploaded generations that the name no longer has, to delete their files later."""
        stays = set() if after is None else {each.generation for each in generations_of(after)}
        self._leftovers += [
            (each.source, key_of(before, each.generation), self.revision)
            for each in generations_of(before)
            if each.source.is_upload and each.generation not in stays
        ]

    def _discard_leftovers(self, now: float) -> None:
        kept: list[tuple[Source, str, int]] = []
        for source, key, revision in self._leftovers:
            if self._is_applied(revision, now) and not self._is_held(key):
                self._store.discard(source)
            else:
                kept.append((source, key, revision))
        self._leftovers = kept

    # The base

    def _merge(self, proposal: p.Merge) -> Operation:
        self._check_no_merge()
        for member in proposal.members:
            saved = self._registered(member.name)
            self._check_open(member.name)
            if not _is_kept(saved, member):
                _check_same(saved, (member.uuid, member.generation))
        plan = p.MergePlan(
            uuid=self._new_uuid(),
            members=proposal.members,
            precision=proposal.precision,
            time=proposal.time,
        )
        self._publish(BaseEntry(self.state.base, plan))
        return self._begin(Operation(self._new_uuid(), "preparing", self.revision))

    def _go_on_preparing(self, operation: Operation, now: float) -> None:
        plan = self.state.preparing
        assert plan is not None
        prepared = [replica.report.prepared for replica in self._living.values()]
        made = [answers[plan.uuid] for answers in prepared if plan.uuid in answers]
        failed = next((error for error in made if error is not None), None)
        if failed is not None:
            self._abandon(operation, failed)
        elif made and len(made) == len(prepared) and self._is_applied(operation.revision, now):
            base = FleetBase(generation=self.state.base.generation + 1, merge=plan)
            try:
                self._change_base(base)
            except TurretError as error:
                self._abandon(operation, error)
                return
            operation.stage, operation.revision = "applying", self.revision
            operation.outcome = p.Outcome(base=base)

    def _abandon(self, operation: Operation, error: TurretError) -> None:
        self._publish(BaseEntry(self.state.base))
        operation.end(error)

    def _unmerge(self) -> Operation:
        if self.state.preparing is not None:
            self._check_no_merge()
        if self.state.base.merge is None:
            raise NotMergedError(say("NOT_MERGED"))
        base = FleetBase(generation=self.state.base.generation + 1)
        self._change_base(base)
        return self._applying(p.Outcome(base=base))

    def _change_base(self, base: FleetBase) -> None:
        self._store.write_base(base)
        self._publish(BaseEntry(base))

    # Checks; each raises the same error as a single server would

    def _registered(self, name: str) -> SavedRegistration:
        if name not in self.state.names:
            raise AdapterNotFoundError(say("ADAPTER_NOT_FOUND", adapters=name))
        return self.state.names[name]

    def _check_open(self, name: str) -> None:
        if name in self.state.closed:
            raise AdapterInUseError(say("BEING_UNLOADED", adapters=name))

    def _check_target(self, target: AliasTarget) -> None:
        """Raises the errors of ``AdapterRegistry.set_alias`` for a target."""
        _check_target(target, self.state.names)
        if target.name in self.state.closed:
            raise AdapterNotFoundError(say("BEING_UNLOADED", adapters=target.name))

    def _is_elsewhere(self, digest: str, name: str) -> bool:
        """Whether another name that is not being unloaded has the same weights."""
        others = (s for s in self.state.names.values() if s.name != name)
        return any(s.facts.digest == digest and s.name not in self.state.closed for s in others)

    def _check_components(self, name: str, facts: AdapterFacts) -> None:
        for digest in facts.components:
            if not self._is_elsewhere(digest, name):
                raise AdapterComponentError(say("COMPONENT_MISSING", digest=digest))

    def _check_not_needed(self, saved: SavedRegistration) -> None:
        """Raises if a fusion or a merge needs the weights of a name.

        A replica that starts while a merge is active computes the merged weights from the members'
        files, so the files must stay.
        """
        digest, name = saved.facts.digest, saved.name
        if self._is_in_base(name):
            raise AdapterMergedError(say("ADAPTER_IN_BASE", adapter=name))
        fusions = [
            other.name
            for other in self.state.names.values()
            if other.name != name
            and any(digest in each.facts.components for each in generations_of(other))
        ]
        if fusions and not self._is_elsewhere(digest, name):
            which = ", ".join(fusions)
            raise AdapterInUseError(say("ADAPTER_IS_COMPONENT", adapter=name, fusions=which))

    def _is_in_base(self, name: str) -> bool:
        """Whether an active merge, or one in preparation, has a generation of the name."""
        plans = (self.state.base.merge, self.state.preparing)
        return any(member.name == name for plan in plans if plan for member in plan.members)

    def _check_no_merge(self) -> None:
        if self.state.preparing is not None:
            raise MergeUnderWayError(say("MERGE_UNDER_WAY"))
        if self.state.base.merge is not None:
            raise MergeActiveError(say("MERGE_ACTIVE"))


def _check_generation(saved: SavedRegistration, expected: int | None) -> None:
    """Raises if the name has another generation; None accepts any."""
    if expected is not None and saved.generation != expected:
        found = {"adapter": saved.name, "generation": saved.generation}
        raise AdapterGenerationError(say("ADAPTER_GENERATION", **found, expected=expected))


def _check_same(saved: SavedRegistration, expected: tuple[str, int]) -> None:
    """Raises if another caller changed the name meanwhile."""
    if saved.uuid != expected[0]:
        found = {"adapter": saved.name, "generation": saved.generation}
        raise AdapterGenerationError(say("ADAPTER_LOADED_AGAIN", **found))
    _check_generation(saved, expected[1])


def _is_kept(saved: SavedRegistration, member: p.MergeMember) -> bool:
    """Whether requests may name the generation of a merge's member."""
    numbers = [each.generation for each in generations_of(saved)]
    return saved.uuid == member.uuid and member.generation in numbers


def _generation(saved: SavedRegistration, generation: int) -> SavedGeneration:
    """A generation that requests may name.

    Raises:
        AdapterNotFoundError: The generation is not kept.
    """
    found = next((each for each in generations_of(saved) if each.generation == generation), None)
    if found is None:
        said = {"adapters": saved.name, "generation": generation}
        raise AdapterNotFoundError(
            say("OTHER_GENERATION", **said, current_generation=saved.generation)
        )
    return found


def _check_target(target: AliasTarget, names: Mapping[str, SavedRegistration]) -> None:
    if target.name not in names:
        raise AdapterNotFoundError(say("ADAPTER_NOT_FOUND", adapters=target.name))
    saved = names[target.name]
    _generation(saved, target.generation)
    if saved.uuid != target.uuid:
        raise AdapterNotFoundError(say("REGISTERED_AGAIN", adapters=target.name))


def _usable_aliases(
    aliases: Iterable[Alias], names: Mapping[str, SavedRegistration]
) -> Iterator[Alias]:
    """The saved aliases, without those whose targets another server has changed since."""
    for alias in aliases:
        try:
            check_alias(alias, (), is_adapter=alias.name in names)
            for target in alias.targets:
                _check_target(target, names)
        except TurretError as error:
            _log.error("cannot restore", extra=log.fields(alias=alias.name, reason=error))
        else:
            yield alias


def _usable_base(base: FleetBase, names: Mapping[str, SavedRegistration]) -> FleetBase:
    """The saved base, without a merge whose members another server has changed since."""
    for member in () if base.merge is None else base.merge.members:
        saved = names.get(member.name)
        if saved is None or not _is_kept(saved, member):
            return FleetBase(generation=base.generation + 1)
    return base
