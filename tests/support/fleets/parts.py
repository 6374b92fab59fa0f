"""A simulated fleet's parts: a disk that crashes at any step, replicas without engines."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from turret.fleet.follower import Change, Follower
from turret.fleet.protocol import (
    AdapterUsage,
    Entry,
    FleetBase,
    FleetState,
    Join,
    generations_of,
    key_of,
)
from turret.server.adapters.adapter import Alias, Source
from turret.server.adapters.state_dir import SavedRegistration
from turret.server.errors import StorageFullError, TurretError


class Crash(Exception):
    """A simulated end of the registry's process."""


def nameable_generations(saved: SavedRegistration) -> list[SavedRegistration]:
    """The registration with each generation that requests may name; the current one is first."""
    return [
        dataclasses.replace(saved, generation=g.generation, source=g.source, facts=g.facts, kept=())
        for g in generations_of(saved)
    ]


@dataclass
class Disk:
    """A disk that survives every crash. ``crash_in`` counts the steps of writes until a crash.

    Attributes:
        history: The past registrations of each name, in order: ``(uuid, generation)``, or None.
            For an alias, the keys of its targets.
        files: The digest of each upload, by path.
    """

    names: dict[str, SavedRegistration] = dataclasses.field(default_factory=dict)
    aliases: dict[str, Alias] = dataclasses.field(default_factory=dict)
    base: FleetBase = dataclasses.field(default_factory=FleetBase)
    history: dict[str, list[tuple[Any, ...] | None]] = dataclasses.field(default_factory=dict)
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    crash_in: int = 0
    is_full: bool = False
    on_remove: Callable[[str], None] = lambda name: None
    on_discard: Callable[[str], None] = lambda path: None

    def _step(self) -> None:
        if self.crash_in:
            self.crash_in -= 1
            if self.crash_in == 0:
                raise Crash

    def _begin_write(self) -> None:
        self._step()
        if self.is_full:
            raise StorageFullError("full")

    def bind(self, base_name: str, base_digest: str) -> None:
        assert base_name == base_digest == "base"

    def read(self, *, sweeps: bool) -> list[SavedRegistration]:
        return list(self.names.values())

    def read_base(self) -> FleetBase:
        return self.base

    def write(self, saved: SavedRegistration) -> None:
        self._begin_write()
        self.names[saved.name] = saved
        self._note(saved.name, (saved.uuid, saved.generation))
        self._step()

    def remove(self, name: str) -> None:
        self._begin_write()
        self.on_remove(name)
        del self.names[name]
        self._note(name, None)
        self._step()

    def read_aliases(self) -> list[Alias]:
        return list(self.aliases.values())

    def save_alias(self, alias: Alias) -> None:
        self._begin_write()
        self.aliases[alias.name] = alias
        self._note(alias.name, alias.targets)
        self._step()

    def remove_alias(self, name: str) -> None:
        self._begin_write()
        del self.aliases[name]
        self._note(name, None)
        self._step()

    def _note(self, name: str, now: tuple[Any, ...] | None) -> None:
        past = self.history.setdefault(name, [None])
        if past[-1] != now:
            past.append(now)

    def write_base(self, base: FleetBase) -> None:
        self._begin_write()
        self.base = base
        self._step()

    def keep(self, source: Source, key: str) -> Source:
        self._begin_write()
        self.files[f"files/{key}"] = self.files.pop(source.path)
        self._step()
        return dataclasses.replace(source, path=f"files/{key}")

    def discard(self, source: Source) -> None:
        self._step()
        if source.is_upload:
            self.on_discard(source.path)
            self.files.pop(source.path, None)
        self._step()


class Replica:
    """One replica: its follower, and the names that the follower has applied.

    Args:
        name: The name, which changes at each restart.
        rate: The speed of its clock.
        stops_alone: See ``Follower``.
    """

    def __init__(self, name: str, rate: float, stops_alone: bool) -> None:
        self.name, self.rate = name, rate
        self.state = FleetState()
        self.requests: list[SavedRegistration] = []
        self.made: dict[str, TurretError | None] = {}
        self.follower = Follower(
            Join(replica=name, base_name="base", base_digest="base", keep_generations=1),
            self,
            stops_alone=stops_alone,
        )
        self.changing: Change | None = None

    def clock(self, now: float) -> float:
        return now * self.rate

    def is_serving(self, now: float) -> bool:
        return self.follower.is_serving(self.clock(now))

    def has_promise(self, now: float) -> bool:
        """Whether results that callers received must hold here."""
        return self.follower.is_current and self.follower.has_lease(self.clock(now))

    def resolve(self, name: str) -> SavedRegistration | None:
        return None if name in self.state.closed else self.state.names.get(name)

    # Applies

    def reset(self, state: FleetState) -> None:
        self.state = state.copy()
        self._end_forced()

    def apply(self, entry: Entry) -> None:
        self.state.apply(entry)
        self._end_forced()
        if self.state.preparing is None:
            self.made.clear()

    def _end_forced(self) -> None:
        forced = {name for name, is_forced in self.state.closed.items() if is_forced}
        self.requests = [saved for saved in self.requests if saved.name not in forced]

    def holding(self) -> Mapping[str, int]:
        held = [s for s in self.requests if self.resolve(s.name) is None or self._is_old(s)]
        return Counter(key_of(saved) for saved in held)

    def _is_old(self, saved: SavedRegistration) -> bool:
        current = self.state.names.get(saved.name)
        return current is None or key_of(saved) not in map(key_of, nameable_generations(current))

    def prepared(self) -> Mapping[str, TurretError | None]:
        return dict(self.made)

    def usage(self) -> Mapping[str, AdapterUsage]:
        counts = Counter(saved.name for saved in self.requests)
        return {name: AdapterUsage(in_flight=count) for name, count in counts.items()}

    def num_requests(self) -> tuple[int, int]:
        return 0, len(self.requests)
