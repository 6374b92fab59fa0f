"""The invariants of a simulated fleet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fleets.parts import Disk, Replica, nameable_generations

from turret.fleet import protocol as m

NAMES = ("a", "b")
ALIASES = ("x", "y")


@dataclass
class Caller:
    """A caller that waits for the outcome of a proposal.

    ``place`` is the index of the newest entry in the name's history when the proposal was accepted.
    """

    proposal: m.Proposal
    operation: str
    uuid: str
    place: int


class Promises:
    """Records served states, and results that callers received.

    Args:
        disk: The disk with the registry's writes.
        promising: Returns the replicas on which all received results must hold.
    """

    def __init__(self, disk: Disk, promising: Callable[[], list[Replica]]) -> None:
        self.disk = disk
        self._promising = promising
        disk.on_remove, disk.on_discard = self._check_unheld, self._check_unread
        self.digests: dict[tuple[str, int], str] = {}
        self.bases: dict[int, str] = {}
        self.told: dict[str, int] = {}
        self.told_base = 1

    def hear(self, caller: Caller, outcome: m.Outcome) -> None:
        """Record that a caller received a result, which must hold from now on."""
        if outcome.saved is not None:
            saved, proposal = outcome.saved, caller.proposal
            if isinstance(proposal, m.Register) and proposal.replaces is not None:
                uuid, generation = proposal.replaces
                assert saved.uuid == uuid, "replaced what was not asked to be"
                assert saved.generation >= generation
            if isinstance(proposal, m.Rollback):
                assert (saved.uuid, saved.generation) == (proposal.replaces[0], proposal.generation)
            was = self.disk.history[saved.name][caller.place]
            assert was == (saved.uuid, saved.generation), "told of what was never written down"
            self._promise(saved.name, caller.place)
        elif isinstance(caller.proposal, m.SetAlias | m.DeleteAlias):
            self._promise(caller.proposal.name, caller.place)
        elif outcome.base is not None:
            self.told_base = max(self.told_base, outcome.base.generation)
        elif isinstance(caller.proposal, m.Unload):
            past = self.disk.history[caller.proposal.name]
            last = max(i for i, was in enumerate(past) if was is not None and was[0] == caller.uuid)
            assert past[last + 1] is None, "told that it is gone"
            self._promise(caller.proposal.name, last + 1)

    def _promise(self, name: str, index: int) -> None:
        self.told[name] = max(self.told.get(name, 0), index)

    def check(self, replica: Replica, now: float) -> None:
        """Check one replica that would answer now."""
        for name in NAMES:
            saved = replica.resolve(name)
            for each in [] if saved is None else nameable_generations(saved):
                key = (each.uuid, each.generation)
                served = self.digests.setdefault(key, each.facts.digest)
                assert served == each.facts.digest, f"two weights under {key}"
            is_known = name in self.disk.history and name not in replica.state.closed
            if replica.has_promise(now) and is_known:
                served_now = None if saved is None else (saved.uuid, saved.generation)
                later = self.disk.history[name][self.told.get(name, 0) :]
                assert served_now in later, (
                    f"{replica.name} serves {served_now} for {name}, not {later}"
                )
        for name in ALIASES:
            alias = replica.state.aliases.get(name)
            if replica.has_promise(now) and name in self.disk.history:
                later = self.disk.history[name][self.told.get(name, 0) :]
                assert (None if alias is None else alias.targets) in later, "an alias is lost"
            for target in () if alias is None else alias.targets:
                saved = replica.resolve(target.name)
                assert saved is not None, f"{name} stands for nothing"
                assert f"{target.uuid}.{target.generation}" in map(
                    m.key_of, nameable_generations(saved)
                )
        base = replica.state.base
        merged = "" if base.merge is None else base.merge.uuid
        assert self.bases.setdefault(base.generation, merged) == merged, "two bases under a number"
        if replica.has_promise(now):
            assert base.generation >= self.told_base, "an acknowledged merge is lost"

    def _check_unheld(self, name: str) -> None:
        uuid = self.disk.names[name].uuid
        for replica in self._promising():
            held = [saved for saved in replica.requests if saved.uuid == uuid]
            assert not held, f"{name} is removed under a request on {replica.name}"

    def _check_unread(self, path: str) -> None:
        saved = [each for known in self.disk.names.values() for each in nameable_generations(known)]
        assert all(each.source.path != path for each in saved)
        for replica in self._promising():
            held = [saved for saved in replica.requests if saved.source.path == path]
            assert not held, f"{path} is removed under a request on {replica.name}"
