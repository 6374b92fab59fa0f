"""A registry, replicas and an unreliable network, simulated on one thread with one clock.

The network loses, delays and reorders messages. The state machines are the production ones. Events
are drawn at random, so a sequence of draws determines a history.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from builders.facts import facts_of
from fleets.parts import Crash, Disk, Replica, nameable_generations
from fleets.promises import ALIASES, NAMES, Caller, Promises

from turret.fleet import protocol as m
from turret.fleet.protocol import MergeMember, key_of
from turret.fleet.registry import FleetRegistry
from turret.server.adapters.adapter import AliasTarget, Source
from turret.server.adapters.state_dir import SavedRegistration
from turret.server.errors import InvalidRequestError, TurretError, UnavailableError

LEASE_SECONDS = 5.0
RATES = (1.0, 0.85, 1.1)

_T = TypeVar("_T")
Draw = Callable[[int], int]


@dataclass
class Letter:
    """A message on its way to the registry, or with ``answer``, its answer on the way back."""

    replica: Replica
    question: m.Join | m.Report
    asked: float
    answer: m.Joined | m.News | m.NotJoinedError | None = None


class World:
    """One fleet.

    Args:
        draw: ``draw(n)`` returns a number below n.
        num_replicas: The number of replicas.
        stops_alone: Whether replicas stop when their leases expire.

    Attributes:
        counts: The numbers of events.
    """

    def __init__(self, draw: Draw, num_replicas: int, stops_alone: bool) -> None:
        self.draw = draw
        self.now = 100.0
        self.counts: Counter[str] = Counter()
        self.disk = Disk()
        self.promises = Promises(self.disk, self._promising)
        self._ids = itertools.count()
        self._stops_alone = stops_alone
        self.registry: FleetRegistry | None = None
        self._start_registry(is_first=True)
        self.replicas = [self._new_replica(i) for i in range(num_replicas)]
        self.letters: list[Letter] = []
        self.cut: set[int] = set()
        self.callers: list[Caller] = []

    def _new_replica(self, index: int) -> Replica:
        rate = RATES[index % len(RATES)]
        return Replica(f"r{index}.{next(self._ids)}", rate, self._stops_alone)

    def _start_registry(self, is_first: bool = False) -> None:
        self.registry = FleetRegistry(
            self.disk,
            now=self.now,
            lease_seconds=LEASE_SECONDS,
            is_first=is_first,
            new_uuid=lambda: f"u{next(self._ids)}",
        )

    # Events

    def act(self) -> None:
        """Run one random event."""
        usual = (
            *(self._beat, self._beat, self._beat, self._beat, self._call, self._deliver),
            *(self._deliver, self._lose, self._apply, self._ask),
            *(self._propose, self._propose, self._propose),
            *(self._make, self._make, self._begin, self._begin, self._begin, self._end),
            *(self._wait, self._restart, self._call),
        )
        rare = (
            *(self._crash_replica, self._crash_registry, self._crash_soon, self._cut),
            *(self._fill, self._withdraw, self._silence),
        )
        actions = usual if self.draw(12) else rare
        actions[self.draw(len(actions))]()
        self.check()

    def _replica(self) -> tuple[int, Replica]:
        index = self.draw(len(self.replicas))
        return index, self.replicas[index]

    def _call(self) -> None:
        _, replica = self._replica()
        question = replica.follower.next_call()
        self.letters.append(Letter(replica, question, replica.clock(self.now)))

    def _deliver(self) -> None:
        if self.letters:
            self._carry(self.letters.pop(self.draw(len(self.letters))))

    def _lose(self) -> None:
        if self.letters:
            self.letters.pop(self.draw(len(self.letters)))

    def _carry(self, letter: Letter) -> None:
        replica = letter.replica
        if replica not in self.replicas or self.replicas.index(replica) in self.cut:
            return
        if letter.answer is not None:
            self._take(letter)
        elif self.registry is not None:
            answer = self._at_registry(lambda registry: self._answer(registry, letter.question))
            if answer is not None:
                self.letters.append(Letter(replica, letter.question, letter.asked, answer))

    def _answer(
        self, registry: FleetRegistry, question: m.Join | m.Report
    ) -> m.Joined | m.News | m.NotJoinedError:
        try:
            if isinstance(question, m.Join):
                return registry.join(question, self.now)
            return registry.report(question, self.now)
        except m.NotJoinedError as error:
            return error

    def _take(self, letter: Letter) -> None:
        follower, question = letter.replica.follower, letter.question
        if isinstance(letter.answer, m.Joined):
            self.counts["joined"] += 1
            follower.joined(letter.answer, letter.asked)
        elif isinstance(question, m.Report):
            if isinstance(letter.answer, m.News):
                follower.take_news(question, letter.answer, letter.asked)
            else:
                self.counts["expelled"] += 1
                follower.must_join()

    def _at_registry(self, call: Callable[[FleetRegistry], _T]) -> _T | None:
        """Run an action of the registry, which may crash it."""
        assert self.registry is not None
        try:
            return call(self.registry)
        except Crash:
            self.counts["crashed at a write"] += 1
            self.registry = None
            return None

    def _beat(self) -> None:
        """A replica reports, gets the answer and applies one change, which is the common case."""
        index, replica = self._replica()
        if index in self.cut or self.registry is None:
            return
        question, asked = replica.follower.next_call(), replica.clock(self.now)
        answer = self._at_registry(lambda registry: self._answer(registry, question))
        if answer is not None:
            self._take(Letter(replica, question, asked, answer))
        self._apply_at(replica)

    def _apply(self) -> None:
        self._apply_at(self._replica()[1])

    def _apply_at(self, replica: Replica) -> None:
        # A change is applied in two steps, so that other events can happen in between.
        if replica.changing is None:
            replica.changing = replica.follower.next_change()
        if replica.changing is not None and self.draw(3):
            replica.follower.apply(replica.changing)
            replica.follower.done(replica.changing)
            replica.changing = None

    def _make(self) -> None:
        for replica in self.replicas:
            self._make_at(replica)

    def _make_at(self, replica: Replica) -> None:
        """Let a replica report that a merge's weights are prepared, or why they cannot be."""
        plan = replica.state.preparing
        if plan is not None and self.draw(2):
            error = None if self.draw(6) else InvalidRequestError("the weights are not finite")
            replica.made.setdefault(plan.uuid, error)

    def _begin(self) -> None:
        _, replica = self._replica()
        saved = replica.resolve(NAMES[self.draw(len(NAMES))])
        if saved is not None and replica.is_serving(self.now):
            generations = nameable_generations(saved)
            replica.requests.append(generations[self.draw(len(generations))])

    def _end(self) -> None:
        _, replica = self._replica()
        if replica.requests:
            replica.requests.pop(self.draw(len(replica.requests)))

    def _wait(self) -> None:
        self._pass((0.1, 0.5, 1.0, 2.0)[self.draw(4)])

    def _silence(self) -> None:
        self._pass(LEASE_SECONDS * (1.0 + 0.3 * self.draw(2)))

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        if self.registry is not None:
            self._at_registry(lambda registry: registry.tick(self.now))

    def _crash_replica(self) -> None:
        index, _ = self._replica()
        self.counts["replica crashed"] += 1
        self.replicas[index] = self._new_replica(index)

    def _crash_registry(self) -> None:
        self.counts["registry crashed"] += 1
        self.registry = None

    def _crash_soon(self) -> None:
        self.disk.crash_in = 1 + self.draw(5)

    def _restart(self) -> None:
        if self.registry is None:
            self.disk.crash_in = 0
            self._start_registry()

    def _cut(self) -> None:
        self.cut ^= {self.draw(len(self.replicas))}

    def _fill(self) -> None:
        self.disk.is_full = not self.disk.is_full and self.draw(3) == 0

    # Callers

    def _propose(self) -> None:
        index, replica = self._replica()
        if self.registry is None or index in self.cut or not replica.is_serving(self.now):
            return
        proposal = self._draw_proposal(replica)
        if proposal is None:
            return
        saved = self.registry.state.names.get(getattr(proposal, "name", ""))
        try:
            number = self._at_registry(lambda registry: registry.submit(proposal, self.now))
        except TurretError as error:
            self.counts[type(error).__name__] += 1
            return
        if number is not None:
            name = getattr(proposal, "name", "")
            place = len(self.disk.history.get(name, ())) - 1
            uuid = "" if saved is None else saved.uuid
            self.callers.append(Caller(proposal, number, uuid, place))

    def _draw_proposal(self, replica: Replica) -> m.Proposal | None:
        kind, name = self.draw(15), NAMES[self.draw(len(NAMES))]
        known = replica.state.names.get(name)
        merge, alias = replica.state.base.merge, ALIASES[self.draw(len(ALIASES))]
        is_aliased = alias in replica.state.aliases
        # Most proposals must be possible, or little would happen.
        is_idle = (kind in (7, 10) and merge is None) or (kind == 14 and not is_aliased)
        if (known is None or is_idle) and self.draw(4):
            kind = 0 if known is None else 4 + self.draw(11)
        elif merge is not None and self.draw(3) == 0:
            kind = 7
        if kind < 4:
            digest = f"d{next(self._ids)}" if self.draw(3) else "same"
            source, is_staged = Source(digest), bool(self.draw(2))
            if is_staged:
                source = Source(f"incoming/{next(self._ids)}", is_upload=True)
                self.disk.files[source.path] = digest
            replaces = None if known is None else (known.uuid, known.generation)
            return m.Register(
                name=name,
                source=source,
                facts=facts_of(digest),
                pinned=self.draw(6) == 0,
                replaces=replaces if self.draw(4) else None,
                is_staged=is_staged,
            )
        if kind == 4:
            return m.Pin(name=name, pinned=bool(self.draw(2)))
        if kind in (5, 8):
            seconds = (0.0, 4.0, 20.0)[self.draw(3)]
            return m.Unload(name=name, is_forced=self.draw(3) == 0, timeout_seconds=seconds)
        if kind in (6, 9) and known is not None:
            member = MergeMember(
                name=name, uuid=known.uuid, generation=known.generation, weight=1.0
            )
            return m.Merge(members=(member,), precision="BF16", time=self.now)
        if kind in (11, 12) and known is not None:
            generations = nameable_generations(known)
            back = generations[self.draw(len(generations))].generation
            replaces = (known.uuid, known.generation)
            return m.Rollback(name=name, generation=back, replaces=replaces)
        if kind == 13 and known is not None:
            generations = nameable_generations(known)
            count = 1 + self.draw(len(generations))
            targets = [
                AliasTarget(name=name, uuid=known.uuid, generation=each.generation)
                for each in generations[-count:]
            ]
            return m.SetAlias(name=alias, targets=tuple(targets))
        if kind == 14:
            return m.DeleteAlias(name=alias)
        return m.Unmerge() if kind in (7, 10) else None

    def _withdraw(self) -> None:
        merges = [c for c in self.callers if isinstance(c.proposal, m.Merge)]
        if merges and self.registry is not None:
            number, error = merges[0].operation, UnavailableError("the caller went away")
            try:
                self._at_registry(lambda registry: registry.cancel(number, error, self.now))
            except UnavailableError:
                self.counts["forgotten"] += 1

    def _ask(self) -> None:
        """All callers request the outcomes of their proposals."""
        waiting, self.callers = self.callers, []
        for caller in waiting:
            if self.registry is None:
                self.callers.append(caller)
                continue
            try:
                outcome = self._at_registry(
                    lambda registry, c=caller: registry.outcome(c.operation, self.now)
                )
            except TurretError as error:
                self.counts[f"{type(caller.proposal).__name__}: {type(error).__name__}"] += 1
                continue
            if outcome is None:
                self.callers.append(caller)
            else:
                self.counts[type(caller.proposal).__name__] += 1
                self.promises.hear(caller, outcome)

    # Invariants

    def check(self) -> None:
        """Check every replica that would answer now."""
        for replica in self.replicas:
            if replica.is_serving(self.now):
                self.promises.check(replica, self.now)

    def _promising(self) -> list[Replica]:
        return [r for r in self.replicas if r.has_promise(self.now)]

    # The end

    def finish(self) -> None:
        """Repair everything, then check that all reported results hold and all replicas agree."""
        self.cut.clear()
        self.letters.clear()
        self.disk.crash_in, self.disk.is_full = 0, False
        if self.registry is None:
            self._start_registry()
        registry = self.registry
        assert registry is not None
        for _ in range(60):
            self.now += 1.0
            for replica in self.replicas:
                replica.requests.clear()
                self._settle(registry, replica)
            self._ask()
            self.check()
        assert not self.callers, "a caller waits forever"
        for replica in self.replicas:
            assert replica.has_promise(self.now)
            assert replica.state == registry.state, "replica and registry disagree"
        assert registry.state.names == self.disk.names
        assert registry.state.aliases == self.disk.aliases
        assert registry.state.base == self.disk.base
        assert not registry.state.closed
        assert registry.state.preparing is None
        self._check_files(registry.state.names)
        merge = registry.state.base.merge
        for member in () if merge is None else merge.members:
            saved = registry.state.names.get(member.name)
            assert saved is not None, "a merged adapter is gone"
            kept = {key_of(each) for each in nameable_generations(saved)}
            assert f"{member.uuid}.{member.generation}" in kept, "a merged generation is gone"

    def _settle(self, registry: FleetRegistry, replica: Replica) -> None:
        question, asked = replica.follower.next_call(), replica.clock(self.now)
        self._take(Letter(replica, question, asked, self._answer(registry, question)))
        while (change := replica.changing or replica.follower.next_change()) is not None:
            replica.changing = None
            replica.follower.apply(change)
            replica.follower.done(change)
        if replica.state.preparing is not None:
            replica.made.setdefault(replica.state.preparing.uuid, None)

    def _check_files(self, names: dict[str, SavedRegistration]) -> None:
        for saved in [each for known in names.values() for each in nameable_generations(known)]:
            if saved.source.is_upload:
                assert saved.source.path == f"files/{key_of(saved)}"
                assert self.disk.files[saved.source.path] == saved.facts.digest
