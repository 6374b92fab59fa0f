"""The table of registered adapters and of those in flight. Its methods are thread-safe."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from turret.server.adapters.adapter import (
    BASE_MIX,
    Adapter,
    AdapterInfo,
    AdapterRef,
    Alias,
    Mix,
    Source,
    State,
    check_no_target,
    kept_generations,
)
from turret.server.adapters.checkpoint import refuse_all
from turret.server.adapters.component import COMPONENTS_KEY, ComponentRef
from turret.server.adapters.leases import Leases
from turret.server.adapters.state_dir import SavedRegistration
from turret.server.basics.names import closest, is_private
from turret.server.errors import (
    AdapterComponentError,
    AdapterExistsError,
    AdapterGenerationError,
    AdapterInUseError,
    AdapterNotFoundError,
)
from turret.server.metrics import Metrics
from turret.server.words import Text, say


@dataclass(eq=False, slots=True)
class Registration:
    """A registered name: its current generation, and the replaced ones that still exist.

    A replaced generation is ``kept`` as long as requests may name it, then ``retired`` as long as
    mixes hold it, and then gone. When the name is unloaded, all generations are retired or gone.

    A registration belongs to the registry and changes under the registry's lock.

    Attributes:
        name: The name in requests.
        uuid: Identifies this registration; a name that is loaded again has a new one.
        current: The generation that new requests get.
        kept: Replaced generations that requests may still name; the last one was served last.
        retired: Other replaced generations, which mixes still hold.
        state: While it is ``DELETING``, new requests are rejected.
        unloaders: Number of calls that are waiting to unload the adapter.
        is_replacing: Whether other content is being loaded.
        last_used_time: Unix seconds of the last request, or None.
    """

    current: Adapter
    kept: tuple[Adapter, ...] = ()
    retired: tuple[Adapter, ...] = ()
    state: State = "ACTIVE"
    unloaders: int = 0
    is_replacing: bool = False
    last_used_time: float | None = None

    @property
    def name(self) -> str:
        return self.current.name

    @property
    def uuid(self) -> str:
        return self.current.uuid

    @property
    def in_flight(self) -> int:
        """The number of mixes that hold any generation."""
        return sum(a.in_flight for a in (*self.named, *self.retired))

    @property
    def named(self) -> tuple[Adapter, ...]:
        """The generations that requests may name; the current one is first."""
        return (self.current, *self.kept)

    @property
    def next_generation(self) -> int:
        """The generation of the next new weights, which this registration has never used.

        The generation with the highest number is always current or kept.
        """
        return max(adapter.generation for adapter in self.named) + 1

    def find(self, generation: int | None) -> Adapter | None:
        """The generation with this number (None: the current one), if requests may name it."""
        return next((a for a in self.named if generation in (None, a.generation)), None)

    @property
    def is_staying(self) -> bool:
        """Whether the current generation is being neither unloaded nor replaced."""
        return self.state == "ACTIVE" and not self.is_replacing

    def is_built_from(self, digest: str) -> bool:
        """Whether a generation in use needs the adapter with this digest."""
        return any(digest in a.facts.components for a in (*self.named, *self.retired))

    def record(self, adapter: Adapter | None = None) -> AdapterInfo:
        """A snapshot of the name and one of its generations; None stands for the current one."""
        adapter = adapter or self.current
        return AdapterInfo(
            name=self.name,
            uuid=self.uuid,
            generation=adapter.generation,
            kept_generations=tuple(sorted(kept.generation for kept in self.kept)),
            facts=adapter.facts,
            bytes_host=adapter.host_bytes_needed if adapter.is_resident else 0,
            bytes_device=adapter.bytes_device,
            residency=adapter.residency,
            pinned=adapter.pinned,
            in_flight=self.in_flight,
            last_used_time=self.last_used_time,
            state=self.state,
            source=adapter.source.came_from,
        )


class NameLocks:
    """One lock per name, so that only one thread at a time changes a name. Not re-entrant.

    The registry's lock may be taken while a name's lock is held, but not the other way round.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken: set[str] = set()

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Holds the lock of a name; waits if another thread holds it."""
        with self._changed:
            self._changed.wait_for(lambda: name not in self._taken)
            self._taken.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._taken.discard(name)
                self._changed.notify_all()


# Maximum number of registered names to compare a missing one with.
_MOST_COMPARED = 256


def name_taken(name: str, digest: str) -> AdapterExistsError:
    """The error for a name that is registered with other weights."""
    return AdapterExistsError(say("ADAPTER_EXISTS", adapter=name, digest=digest))


def generation_of(registration: Registration, generation: int | None) -> Adapter:
    """A generation that requests may name; None stands for the current one.

    Raises:
        AdapterNotFoundError: The generation never existed, or is not kept.
    """
    adapter = registration.find(generation)
    if adapter is None:
        current = registration.current.generation
        facts = {"adapters": registration.name, "generation": generation}
        raise AdapterNotFoundError(say("OTHER_GENERATION", **facts, current_generation=current))
    return adapter


def generation_for_rollback(registration: Registration, generation: int | None) -> Adapter:
    """A generation that requests may name; None stands for the highest below the current one.

    Raises:
        AdapterNotFoundError: There is no such generation.
    """
    if generation is not None:
        return generation_of(registration, generation)
    current = registration.current.generation
    earlier = [adapter for adapter in registration.kept if adapter.generation < current]
    if not earlier:
        facts = {"adapters": registration.name, "current_generation": current}
        raise AdapterNotFoundError(say("NO_EARLIER_GENERATION", **facts))
    return max(earlier, key=lambda adapter: adapter.generation)


def registration_of(saved: SavedRegistration, known: Iterable[Adapter] = ()) -> Registration:
    """Makes a registration from its saved form.

    Args:
        saved: The saved form.
        known: Generations that exist already, which are used instead of new objects.
    """
    by_number = {adapter.generation: adapter for adapter in known}
    current, *kept = (
        by_number.get(each.generation)
        or Adapter(saved.name, saved.uuid, each.generation, each.source, each.facts)
        for each in (saved, *saved.kept)
    )
    for adapter in kept:
        adapter.is_retired = True
    return Registration(current, tuple(kept))


def _check_distinct(names: Iterable[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    refuse_all([("adapters", say("DUPLICATE", value=name)) for name in repeated])


def _not_found(name: str, names: Sequence[str] = ()) -> Text:
    return say("ADAPTER_NOT_FOUND", adapters=name, closest=closest(name, names))


class NameTable:
    """Names, generations and the mixes that hold them.

    Args:
        lock: Shared with ``leases``; re-entrant.
        leases: Manages the use of adapters in memory.
        metrics: Receives the registered names.
        keep_generations: The number of replaced generations of a name that requests may still name.
        on_gone: Called, without the lock, with a generation that no request will use again.
    """

    def __init__(
        self,
        lock: threading.RLock,
        leases: Leases,
        metrics: Metrics,
        on_gone: Callable[[Adapter], None],
        *,
        keep_generations: int = 0,
    ) -> None:
        self._keep_generations = keep_generations
        self._changed = threading.Condition(lock)
        self._leases = leases
        self._metrics = metrics
        self._on_gone = on_gone
        self._by_name: dict[str, Registration] = {}
        self._aliases: dict[str, Alias] = {}
        self._mixes: set[Mix] = set()
        # Maps keys of generations that were dropped while requests held them to their
        # registrations.
        self._dropped: dict[str, Registration] = {}
        # The number of adapters being loaded that need a component, by its digest.
        self._awaited: Counter[str] = Counter()

    def find(self, name: str, *, suggests: bool = True) -> Registration:
        """The registration of a name.

        Args:
            name: The name.
            suggests: Whether the error suggests a name, which takes milliseconds.

        Raises:
            AdapterNotFoundError: The name is not registered.
        """
        with self._changed:
            if name in self._by_name:
                return self._by_name[name]
            if name in self._aliases:
                raise AdapterNotFoundError(say("IS_ALIAS", alias=name))
            names = itertools.chain(self._aliases, self._by_name)
            shown = itertools.filterfalse(is_private, names)
            compared = list(itertools.islice(shown, _MOST_COMPARED if suggests else 0))
        raise AdapterNotFoundError(_not_found(name, compared))

    def get(self, name: str) -> Registration | None:
        with self._changed:
            return self._by_name.get(name)

    def records(self) -> list[AdapterInfo]:
        """Snapshots of all adapters, by name.

        Each snapshot is consistent, but the list as a whole may not be.
        """
        with self._changed:
            registrations = list(self._by_name.values())
        registrations.sort(key=lambda registration: registration.name)
        records = []
        for registration in registrations:
            # Take the lock per record: an engine step must not wait for thousands of records.
            with self._changed:
                records.append(registration.record())
        return records

    def check_active(self, registration: Registration) -> None:
        """Raises AdapterInUseError during an unload, and AdapterNotFoundError after it."""
        with self._changed:
            if self._by_name.get(registration.name) is not registration:
                raise AdapterNotFoundError(_not_found(registration.name))
            if registration.state != "ACTIVE":
                raise AdapterInUseError(say("BEING_UNLOADED", adapters=registration.name))

    def add(self, registration: Registration) -> None:
        """Add a registration, so that requests may name it."""
        with self._changed:
            assert registration.name not in self._by_name
            self._by_name[registration.name] = registration
            self._metrics.adapter_registered(registration.name, registration.current.residency)

    def kept_after(self, registration: Registration, adapter: Adapter) -> tuple[Adapter, ...]:
        """The generations that ``swap`` with these arguments keeps."""
        with self._changed:
            before = registration.current
            replaced = [*(a for a in registration.kept if a is not adapter), before]
            return self._kept(adapter, replaced)

    def _kept(self, current: Adapter, replaced: Sequence[Adapter]) -> tuple[Adapter, ...]:
        aliases = self._aliases.values()
        return kept_generations(current.name, current, replaced, self._keep_generations, aliases)

    def still_kept(self, registration: Registration) -> tuple[Adapter, ...]:
        """The kept generations that ``kept_generations`` still selects."""
        with self._changed:
            return self._kept(registration.current, registration.kept)

    # The targets of aliases are always current or kept: ``kept_generations`` keeps the generations,
    # and ``check_not_aliased`` the names.

    def aliases(self) -> list[Alias]:
        """All aliases, by name."""
        with self._changed:
            return sorted(self._aliases.values(), key=lambda alias: alias.name)

    def alias(self, name: str) -> Alias | None:
        with self._changed:
            return self._aliases.get(name)

    def put_alias(self, alias: Alias) -> None:
        """Set an alias for later requests. Its targets must be current or kept generations."""
        with self._changed:
            self._aliases[alias.name] = alias

    def remove_alias(self, name: str) -> None:
        """Remove an alias."""
        with self._changed:
            del self._aliases[name]

    def check_not_aliased(self, registration: Registration) -> None:
        """Raises AdapterInUseError if an alias names the adapter."""
        check_no_target(registration.name, self.aliases())

    def swap(self, registration: Registration, current: Adapter, kept: Sequence[Adapter]) -> None:
        """Set the generations that requests may name. The others end with their last request."""
        with self._changed:
            before, named = registration.current, registration.named
            registration.current, registration.kept = current, tuple(kept)
            for adapter in registration.named:
                adapter.is_retired = adapter is not current
            left = [adapter for adapter in named if adapter not in registration.named]
            for adapter in left:
                adapter.is_retired = True
            registration.retired += tuple(left)
            gone = self._forget_retired(registration)
            if current is not before:
                self._metrics.adapter_residency(registration.name, current.residency)
                self._leases.set_pinned(before, False)
        self._part_with(gone)

    def remove(self, registration: Registration) -> None:
        """Removes a name that is being unloaded, and that no mix holds, from the table."""
        with self._changed:
            assert registration.in_flight == 0
            del self._by_name[registration.name]
            for adapter in registration.named:
                self._leases.forget(adapter, "unload")
            self._metrics.adapter_removed(registration.name)

    def drop(self, registration: Registration) -> None:
        """Removes a name even if mixes hold it; generations end with their last mix."""
        with self._changed:
            del self._by_name[registration.name]
            adapter = registration.current
            adapter.is_retired = True
            registration.retired += registration.named
            registration.kept = ()
            gone = self._forget_retired(registration)
            self._dropped.update({a.key: registration for a in registration.retired})
            self._leases.set_pinned(adapter, False)
            self._metrics.adapter_removed(registration.name)
        self._part_with(gone)

    def source_of(self, ref: ComponentRef) -> Source:
        """The directory with the files of a component.

        Raises:
            AdapterComponentError: No adapter with this digest is registered and staying.
        """
        with self._changed:
            for registration in self._by_name.values():
                if registration.current.digest == ref.digest and registration.is_staying:
                    return registration.current.source
            named = self._by_name.get(ref.name)
        facts = {"component": ref.name, "digest": ref.digest}
        if named is None:
            text = say("COMPONENT_NOT_REGISTERED", **facts)
        elif named.current.digest == ref.digest:
            text = say("COMPONENT_LEAVING", **facts)
        else:
            text = say("COMPONENT_IS_OTHER", **facts, found=named.current.digest)
        raise AdapterComponentError(text, violations=[(COMPONENTS_KEY, text)])

    @contextmanager
    def awaiting(self, digests: Sequence[str]) -> Iterator[None]:
        """Keeps components registered while the adapter built from them is being loaded."""
        with self._changed:
            self._awaited.update(digests)
        try:
            yield
        finally:
            with self._changed:
                self._awaited.subtract(digests)

    @contextmanager
    def replacing(self, registration: Registration) -> Iterator[None]:
        """While this context is open, no new fusion is built from the current generation.

        Raises:
            AdapterInUseError: A fusion, perhaps still being loaded, needs the current generation.
        """
        with self._changed:
            self.check_not_component(registration)
            registration.is_replacing = True
        try:
            yield
        finally:
            with self._changed:
                registration.is_replacing = False

    def check_generation(self, name: str, expected: int | None) -> None:
        """Raises AdapterGenerationError if the name has another generation; None allows any."""
        if expected is None:
            return
        with self._changed:
            found = self.find(name).current.generation
        if found != expected:
            text = say("ADAPTER_GENERATION", adapter=name, generation=found, expected=expected)
            raise AdapterGenerationError(text)

    def check_not_component(self, registration: Registration) -> None:
        """Raises AdapterInUseError if a fusion needs weights that no other name has."""
        digest = registration.current.digest
        with self._changed:
            others = [r for r in self._by_name.values() if r is not registration]
            if any(r.current.digest == digest and r.is_staying for r in others):
                return
            fusions = [r.name for r in others if r.is_built_from(digest)]
            if not fusions and self._awaited[digest] == 0:
                return
        which = ", ".join(map(repr, fusions)) or "an adapter that is being loaded"
        text = say("ADAPTER_IS_COMPONENT", adapter=registration.name, fusions=which)
        raise AdapterInUseError(text)

    def wait_until_unheld(self, registration: Registration, timeout_seconds: float | None) -> None:
        """Waits until no mix holds a generation, or until the timeout. The caller checks which."""
        with self._changed:
            self._changed.wait_for(lambda: registration.in_flight == 0, timeout_seconds)

    def resolve(self, ref: AdapterRef, *, suggests: bool = True) -> tuple[Registration, Adapter]:
        """The registration and generation that a request names, perhaps through an alias.

        Args:
            ref: The reference.
            suggests: See ``find``.

        Raises:
            AdapterNotFoundError: There is no such adapter, or the name is being unloaded.
        """
        with self._changed:
            name, generation = ref.name, ref.generation
            alias = self._aliases.get(name)
            if alias is not None and ref.draw is not None:
                if generation is not None:
                    raise AdapterNotFoundError(say("ALIAS_GENERATION", alias=name))
                target = alias.pick(ref.draw)
                name, generation = target.name, target.generation
            registration = self.find(name, suggests=suggests)
            if registration.state != "ACTIVE":
                raise AdapterNotFoundError(say("BEING_UNLOADED", adapters=name))
            return registration, generation_of(registration, generation)

    def acquire(self, refs: Sequence[AdapterRef], tenant: bytes) -> Mix:
        """See ``AdapterRegistry.acquire``."""
        if not refs:
            return BASE_MIX
        _check_distinct(ref.name for ref in refs)
        with self._changed:
            found: list[tuple[Registration, Adapter, float]] = []
            missing: list[AdapterRef] = []
            for ref in refs:
                try:
                    found.append((*self.resolve(ref, suggests=False), ref.weight))
                except AdapterNotFoundError:
                    missing.append(ref)
            if len(missing) == 1:
                self.resolve(missing[0])
            if missing:
                raise AdapterNotFoundError(_not_found(",".join(ref.name for ref in missing)))
            # An alias may stand for another member of the mix.
            _check_distinct(registration.name for registration, _, _ in found)
            now = time.time()
            for registration, _, _ in found:
                registration.last_used_time = now
            return self.open([(adapter, weight) for _, adapter, weight in found], tenant)

    def open(self, members: Sequence[tuple[Adapter, float]], tenant: bytes = b"") -> Mix:
        """A mix of these generations; ``release`` ends it."""
        with self._changed:
            for adapter, _ in members:
                adapter.in_flight += 1
            mix = Mix(tuple(members), self._leases.ensure_host, tenant)
            self._mixes.add(mix)
            self._leases.open_lease(mix)
            return mix

    def release(self, mix: Mix) -> None:
        """See ``AdapterRegistry.release``."""
        with self._changed:
            if mix not in self._mixes:
                return
            self._mixes.remove(mix)
        # Release the hold first, because a thread that sees 0 in flight may forget the adapter.
        self._leases.close_lease(mix)
        gone: list[Adapter] = []
        with self._changed:
            for adapter, _ in mix.members:
                adapter.in_flight -= 1
                if adapter.is_retired and adapter.in_flight == 0:
                    dropped = self._dropped.pop(adapter.key, None)
                    gone += self._forget_retired(dropped or self._by_name[adapter.name])
            self._changed.notify_all()
        self._part_with(gone)

    def _forget_retired(self, registration: Registration) -> list[Adapter]:
        gone = [adapter for adapter in registration.retired if adapter.in_flight == 0]
        for adapter in gone:
            self._leases.forget(adapter, "replace")
        registration.retired = tuple(a for a in registration.retired if a.in_flight)
        return gone

    def _part_with(self, gone: Sequence[Adapter]) -> None:
        for adapter in gone:
            self._on_gone(adapter)
