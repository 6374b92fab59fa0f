"""A replica's adapters and base, which follow the fleet's registry.

If a caller requests a change, the replica checks it and proposes it to the registry. The call
returns once every replica has made the change. Apart from uploads, a replica only reads the state
directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from turret.fleet import protocol as p
from turret.fleet.follower import Channel, ReplicaLink, propose
from turret.fleet.words import say
from turret.server import log
from turret.server.adapters.adapter import Adapter, AdapterInfo, AdapterRef, Alias
from turret.server.adapters.base import Allowed, BaseModel, ChangedBase, Precision
from turret.server.adapters.installer import NewWeights
from turret.server.adapters.merger import ChangeBase, Edit, Merger, MergeState, PreparedMerge
from turret.server.adapters.name_table import (
    Registration,
    generation_for_rollback,
    registration_of,
)
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.registry import AdapterRegistry, UnloadMode
from turret.server.adapters.state_dir import SavedRegistration, SharedStateDir
from turret.server.basics.work import Cancellation
from turret.server.config import AdapterConfig
from turret.server.errors import (
    AdapterGenerationError,
    MergeActiveError,
    TurretError,
    UnavailableError,
)
from turret.server.metrics import Metrics
from turret.server.remote import AdapterHub, RemoteAdapters

_log = logging.getLogger(__name__)

# Attempts at a replacement while other callers replace the same adapter first.
_ATTEMPTS = 5
_FORCE_AGAIN_SECONDS = 0.25
# Interval of usage figures: collecting them for thousands of adapters takes milliseconds, every
# change is sent to the registry, and the registry sends all of them to every replica that asks.
_USAGE_SECONDS = 1.0
_FASTER = ("disk", "host", "device")


class ReplicaRegistry(AdapterRegistry):
    """An ``AdapterRegistry`` that follows the fleet's registry; weights are read lazily.

    Args:
        channel: The channel to the fleet's registry.
        replica: This replica's name.
        arguments, options: Those of ``AdapterRegistry``.
    """

    def __init__(self, channel: Channel, replica: str, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._channel = channel
        self._replica = replica
        # Registrations with generations that get no new requests, but may still be held.
        self._leaving: set[Registration] = set()
        self._usage: Mapping[str, p.AdapterUsage] = {}
        self._usage_time = float("-inf")
        # The usage on each other replica, as the registry knew it when this one last asked.
        self._elsewhere: list[Mapping[str, p.AdapterUsage]] = []
        self._asked_time = float("-inf")
        self._pinner = ThreadPoolExecutor(1, thread_name_prefix="adapter-pins")

    def restore(self) -> int:
        """Restores nothing: the registry sends what is registered; see ``follow``."""
        return 0

    def close(self) -> None:
        self._pinner.shutdown(wait=False, cancel_futures=True)
        super().close()

    # Requests of callers. In addition to the errors of ``AdapterRegistry``, each method raises
    # UnavailableError if the fleet's registry cannot be reached.

    def _put(self, new: NewWeights) -> AdapterInfo:
        if new.replace:
            self._table.find(new.name)
        proposal = p.Register(
            name=new.name,
            source=new.source,
            facts=self._installer.inspect(new),
            pinned=new.pinned,
            is_staged=new.staged is not None,
        )
        if not new.replace:
            return self._made(proposal)

        def replace_current(registration: Registration) -> AdapterInfo:
            replaces = (registration.uuid, registration.current.generation)
            return self._made(dataclasses.replace(proposal, replaces=replaces))

        return self._on_current(new.name, new.expected_generation, replace_current)

    def _made(self, proposal: p.Register | p.Rollback | p.Pin) -> AdapterInfo:
        saved = propose(self._channel, proposal).saved
        assert saved is not None
        # Wait until the adapters pinned here have been read into memory.
        self._pinner.submit(lambda: None).result()
        registration = self._table.get(saved.name)
        if registration is not None:
            record = self._record(registration)
            if (record.uuid, record.generation) == (saved.uuid, saved.generation):
                return record
        # The name has changed again meanwhile, so return the record of this call's change.
        return registration_of(saved).record()

    def _on_current(
        self, name: str, expected: int | None, change: Callable[[Registration], AdapterInfo]
    ) -> AdapterInfo:
        """Calls ``change`` with the registration of a name, and returns its result.

        If another caller changes the current generation first, this calls ``change`` again, unless
        a certain generation is expected.
        """
        attempt = 1
        while True:
            try:
                return change(self._table.find(name))
            except AdapterGenerationError:
                # Another change will arrive here soon, or this replica lags behind.
                if expected is not None or attempt == _ATTEMPTS:
                    raise
                attempt += 1
                time.sleep(0.05 * attempt)

    def pin(self, name: str) -> AdapterInfo:
        self._table.find(name)
        return self._made(p.Pin(name=name, pinned=True))

    def unpin(self, name: str) -> AdapterInfo:
        self._table.find(name)
        return self._made(p.Pin(name=name, pinned=False))

    def unload(
        self,
        name: str,
        mode: UnloadMode = "DRAIN",
        timeout_seconds: float | None = 30.0,
        expected_generation: int | None = None,
    ) -> None:
        self._table.find(name)
        proposal = p.Unload(
            name=name,
            is_forced=mode == "FORCE",
            timeout_seconds=timeout_seconds,
            expected_generation=expected_generation,
        )
        propose(self._channel, proposal)

    def rollback(
        self, name: str, generation: int | None = None, expected_generation: int | None = None
    ) -> AdapterInfo:
        def roll_back(registration: Registration) -> AdapterInfo:
            self._table.check_active(registration)
            current = registration.current
            adapter = generation_for_rollback(registration, generation)
            if adapter is current:
                return self.get(name)
            # Read the adapter first, to detect changed files before anything else changes.
            with self._installer.resident(adapter):
                return self._made(
                    p.Rollback(
                        name=name,
                        generation=adapter.generation,
                        replaces=(current.uuid, current.generation),
                    )
                )

        self._table.check_generation(name, expected_generation)
        return self._on_current(name, expected_generation, roll_back)

    def set_alias(self, name: str, targets: Sequence[AdapterRef]) -> Alias:
        self._check_free(name)
        proposal = p.SetAlias(name=name, targets=tuple(map(self._target, targets)))
        alias = propose(self._channel, proposal).alias
        assert alias is not None
        return alias

    def delete_alias(self, name: str) -> None:
        propose(self._channel, p.DeleteAlias(name=name))

    def get(self, name: str, generation: int | None = None) -> AdapterInfo:
        return _with_usage(super().get(name, generation), self._usage_elsewhere())

    def list(self) -> list[AdapterInfo]:
        elsewhere = self._usage_elsewhere()
        return [_with_usage(record, elsewhere) for record in super().list()]

    def _usage_elsewhere(self) -> Sequence[Mapping[str, p.AdapterUsage]]:
        # All replicas share the registry, so clients must not be able to keep it busy. Calls within
        # the interval use the last answer.
        now = time.monotonic()
        if now - self._asked_time >= _USAGE_SECONDS:
            self._asked_time = now
            # If the registry cannot be reached, keep its last answer.
            with contextlib.suppress(UnavailableError):
                usage = self._channel.usage()
                self._elsewhere = [used for each, used in usage.items() if each != self._replica]
        return self._elsewhere

    # Instructions of the registry

    def follow_alias(self, entry: p.AliasEntry) -> None:
        """Applies an entry: sets or removes the alias of its name."""
        if entry.alias is not None:
            self._put_alias(entry.alias)
        elif self._table.alias(entry.name) is not None:
            self._take_alias(entry.name)

    def follow(self, entry: p.NameEntry) -> None:
        """Applies an entry: registers, replaces or removes the adapter of its name."""
        saved = entry.saved
        with self._lock:
            registration = self._table.get(entry.name)
            if registration is not None and (saved is None or registration.uuid != saved.uuid):
                self._table.drop(registration)
                self._leaving.add(registration)
                registration = None
            if saved is None:
                return
            if registration is None:
                registration = registration_of(saved)
                self._table.add(registration)
            else:
                after = registration_of(saved, registration.named)
                self._table.swap(registration, after.current, after.kept)
                self._leaving.add(registration)
                registration.current.source = saved.source
            if entry.is_forced is None:
                registration.state = "ACTIVE"
            else:
                registration.state = "DELETING"
                self._leaving.add(registration)
            needs_pin = saved.pinned != registration.current.pinned
        if needs_pin:
            self._pinner.submit(self._follow_pin, registration, saved)
        if entry.is_forced:
            threading.Thread(
                target=self._force, args=(registration,), name="force unload", daemon=True
            ).start()

    def _follow_pin(self, registration: Registration, saved: SavedRegistration) -> None:
        with self._lock:
            is_current = registration.current.generation == saved.generation
            if not is_current or self._table.get(saved.name) is not registration:
                return
        try:
            if saved.pinned:
                self._installer.pin(registration)
            else:
                self._installer.unpin(registration)
        except TurretError as error:
            _log.error("cannot pin", extra=log.fields(adapter=saved.name, reason=error))

    def _force(self, registration: Registration) -> None:
        # Repeat, because a request that took its adapters just before the name was closed may reach
        # the engine only after the first attempt.
        while registration.state == "DELETING" and registration.in_flight:
            self._end_users(registration.uuid)
            self._table.wait_until_unheld(registration, _FORCE_AGAIN_SECONDS)

    def names(self) -> set[str]:
        """All names that are registered here."""
        return {record.name for record in super().list()}

    def holding(self) -> dict[str, int]:
        """The number of requests on each generation that is replaced or being unloaded, by key."""
        with self._lock:
            departing = {r: found for r in self._leaving if (found := _departing(r))}
            self._leaving = set(departing)
            found = [adapter for adapters in departing.values() for adapter in adapters]
            return {adapter.key: adapter.in_flight for adapter in found if adapter.in_flight}

    def usage(self) -> Mapping[str, p.AdapterUsage]:
        """Adapters in memory or in use, by name; up to a second old."""
        now = time.monotonic()
        if now - self._usage_time >= _USAGE_SECONDS:
            self._usage_time = now
            usage = {
                record.name: p.AdapterUsage(
                    in_flight=record.in_flight,
                    residency=record.residency,
                    bytes_host=record.bytes_host,
                    bytes_device=record.bytes_device,
                    last_used_time=record.last_used_time,
                )
                for record in self._table.records()
                if record.in_flight or record.residency != "disk" or record.last_used_time
            }
            # Return the same object while nothing changes, so that it is not reported again.
            if usage != self._usage:
                self._usage = usage
        return self._usage


def _departing(registration: Registration) -> list[Adapter]:
    """Generations that get no new requests.

    A registration's ``named`` generations are those that requests may name, the current one first.
    Its ``retired`` ones are those that only earlier requests hold. A name that is being unloaded
    gives up both; one that has been dropped has only retired generations left.
    """
    if registration.state == "ACTIVE" or registration.current.is_retired:
        return list(registration.retired)
    return [*registration.named, *registration.retired]


def _with_usage(
    record: AdapterInfo, elsewhere: Sequence[Mapping[str, p.AdapterUsage]]
) -> AdapterInfo:
    """A replica's record with the usage of all replicas: summed figures, and the fastest tier.

    Args:
        record: The record of this replica.
        elsewhere: The usage on each other replica, by the adapter's name.
    """
    used = [usage[record.name] for usage in elsewhere if record.name in usage]
    if not used:
        return record
    times = [each.last_used_time for each in (record, *used) if each.last_used_time is not None]
    return dataclasses.replace(
        record,
        bytes_host=record.bytes_host + sum(each.bytes_host for each in used),
        bytes_device=record.bytes_device + sum(each.bytes_device for each in used),
        residency=max((each.residency for each in (record, *used)), key=_FASTER.index),
        in_flight=record.in_flight + sum(each.in_flight for each in used),
        last_used_time=max(times, default=None),
    )


@dataclass(slots=True)
class _Preparation:
    """A plan whose merged weights are being computed, are ready or cannot be computed."""

    plan: p.MergePlan
    cancellation: Cancellation = field(default_factory=Cancellation)
    made: Future[PreparedMerge] = field(default_factory=Future)


class ReplicaMerger(Merger):
    """A ``Merger`` that follows the fleet's registry.

    One thread passes on the registry's instructions; callers may use any thread.

    Args:
        channel: The channel to the fleet's registry.
        arguments, options: Those of ``Merger``.

    Attributes:
        on_prepared: Called when a plan's weights are ready or cannot be computed.
    """

    def __init__(self, channel: Channel, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._channel = channel
        self.on_prepared: Callable[[], None] = lambda: None
        self._preparation: _Preparation | None = None

    # Requests of callers

    def merge(
        self, refs: Sequence[AdapterRef], precision: Precision | None, cancellation: Cancellation
    ) -> MergeState:
        """Like ``Merger.merge``, but on every replica or on none.

        Raises:
            UnavailableError: The registry cannot be reached.
        """
        if not refs:
            # ``Merger.merge`` rejects an empty mix.
            return super().merge(refs, precision, cancellation)
        # Try the merge here first, to determine the generations and the precision that all replicas
        # then use.
        with self._only_change():
            if self._state.merge is not None:
                raise MergeActiveError(say("MERGE_ACTIVE"))
            tried = self._prepare(refs, precision, cancellation)
            self._registry.release(tried.mix)
        members = tuple(
            p.MergeMember(name=a.name, uuid=a.uuid, generation=a.generation, weight=a.weight)
            for a in tried.merge.adapters
        )
        proposal = p.Merge(members=members, precision=tried.merge.precision, time=time.time())
        del tried
        propose(self._channel, proposal, cancellation)
        return self._state

    def unmerge(self, cancellation: Cancellation) -> MergeState:
        """Like ``Merger.unmerge``, but on every replica."""
        propose(self._channel, p.Unmerge(), cancellation)
        return self._state

    # Instructions of the registry

    def prepare(self, plan: p.MergePlan | None) -> None:
        """Begins to prepare a plan's weights on a separate thread; None discards them."""
        before = self._preparation
        if plan is not None and before is not None and plan.uuid == before.plan.uuid:
            return
        self._give_up()
        if plan is not None:
            self._preparation = preparation = _Preparation(plan)
            threading.Thread(
                target=self._make, args=(preparation,), name="merge", daemon=True
            ).start()

    def prepared(self) -> Mapping[str, TurretError | None]:
        """The finished preparation by its plan: None if the weights are ready, else the error."""
        preparation = self._preparation
        if preparation is None or not preparation.made.done():
            return {}
        error = preparation.made.exception()
        assert error is None or isinstance(error, TurretError)
        return {preparation.plan.uuid: error}

    def _make(self, preparation: _Preparation) -> None:
        plan = preparation.plan
        refs = [
            AdapterRef(name=member.name, generation=member.generation, weight=member.weight)
            for member in plan.members
        ]
        try:
            made = self._prepare(refs, plan.precision, preparation.cancellation)
        except TurretError as error:
            preparation.made.set_exception(error)
        except Exception:
            _log.exception("a merge failed", extra=log.fields(plan=plan.uuid))
            error = UnavailableError(say("MERGE_FAILED"))
            preparation.made.set_exception(error)
        else:
            preparation.made.set_result(made)
        self.on_prepared()

    def _give_up(self) -> None:
        preparation = self._preparation
        if preparation is None:
            return
        preparation.cancellation.set(UnavailableError(say("MERGE_WITHDRAWN")))
        wait([preparation.made])
        self._preparation = None
        if preparation.made.exception() is None:
            self._registry.release(preparation.made.result().mix)

    def follow(self, base: p.FleetBase) -> None:
        """Switches to this base; blocks until the engine has exchanged the weights.

        Raises:
            TurretError: The weights cannot be computed, so the replica cannot serve.
            UnavailableError: The engine stops.
        """
        plan = base.merge
        if base.generation == self._state.base_generation:
            return
        if self._active is not None:
            # Unmerge, then merge. In between, the base has a generation number that no other state
            # uses.
            number = base.generation if plan is None else -base.generation
            with self._turn:
                self._apply(self._active, None, Cancellation(), number)
        self.prepare(plan)
        if self._preparation is not None:
            try:
                made = self._preparation.made.result()
                with self._turn:
                    self._apply(made.edit, made.merge, Cancellation(), base.generation)
            finally:
                self._give_up()
        elif base.generation != self._state.base_generation:
            # A merge was made and undone meanwhile: the weights are the same, with another
            # generation number.
            self._change_base(lambda: self._renumbered(base.generation)).result()
            self._state = MergeState(base.generation)

    def _renumbered(self, generation: int) -> ChangedBase:
        return self._registry.change_base(self._describe(generation))


class ReplicaParts:
    """Makes the registry, the merger and the link of a replica, in this order.

    This object also applies the fleet's state to the registry and the merger; see ``Applies``.

    Args:
        name: The replica's name, which no other replica has ever had.
        channel: The channel to the fleet's registry.
        stops_alone: Whether to serve nothing while the registry cannot be reached; see
            ``Follower``.
    """

    def __init__(self, name: str, channel: Channel, *, stops_alone: bool = False) -> None:
        self.name = name
        self._channel = channel
        self._stops_alone = stops_alone
        self._keep_generations = 0
        self._registry: ReplicaRegistry
        self._merger: ReplicaMerger
        self.num_requests: Callable[[], tuple[int, int]] = lambda: (0, 0)

    def registry(
        self,
        config: AdapterConfig,
        base: BaseModel,
        metrics: Metrics,
        admit: Callable[[AdapterOperators], None],
    ) -> ReplicaRegistry:
        """The replica's adapters."""
        assert config.state_dir is not None
        self._keep_generations = config.keep_generations
        self._registry = ReplicaRegistry(
            self._channel,
            self.name,
            config.adapter_root,
            base,
            config.adapter_host_bytes,
            config.max_rank,
            metrics,
            state=SharedStateDir(config.state_dir, config.max_upload_bytes),
            allowed=Allowed(
                config.allow_other_base, config.allow_dense_adapters, config.strict_base
            ),
            hub=AdapterHub(config.adapter_hub, config.max_upload_bytes),
            remotes=RemoteAdapters(config.adapter_remote, config.max_upload_bytes),
            admit=admit,
        )
        return self._registry

    def merger(
        self,
        *,
        edit: Callable[[Precision], Edit],
        describe: Callable[[int], BaseModel],
        change_base: ChangeBase,
        metrics: Metrics,
    ) -> ReplicaMerger:
        """The merger of the replica's base."""
        self._merger = ReplicaMerger(
            self._channel,
            self._registry,
            edit=edit,
            describe=describe,
            change_base=change_base,
            metrics=metrics,
        )
        return self._merger

    def link(self, num_requests: Callable[[], tuple[int, int]]) -> ReplicaLink:
        """The link that keeps registry and merger up to date.

        Start it when the engine runs, and close it before everything else.

        Args:
            num_requests: Returns the numbers of waiting and of running requests.
        """
        base = self._registry.base
        self.num_requests = num_requests
        join = p.Join(
            replica=self.name,
            base_name=base.name,
            base_digest=base.digest,
            keep_generations=self._keep_generations,
        )
        link = ReplicaLink(join, self, self._channel, stops_alone=self._stops_alone)
        self._merger.on_prepared = link.report_soon
        return link

    def reset(self, state: p.FleetState) -> None:
        """Replaces the whole state by a snapshot."""
        # Remove outdated aliases first: in the new state, their names may be those of adapters.
        for alias in self._registry.aliases():
            if alias.name not in state.aliases:
                self.apply(p.AliasEntry(alias.name))
        for entry in state.entries():
            self.apply(entry)
        for name in self._registry.names() - state.names.keys():
            self.apply(p.NameEntry(name))

    def apply(self, entry: p.Entry) -> None:
        if isinstance(entry, p.NameEntry):
            self._registry.follow(entry)
        elif isinstance(entry, p.AliasEntry):
            self._registry.follow_alias(entry)
        else:
            self._merger.follow(entry.base)
            self._merger.prepare(entry.preparing)

    def holding(self) -> Mapping[str, int]:
        return self._registry.holding()

    def prepared(self) -> Mapping[str, TurretError | None]:
        return self._merger.prepared()

    def usage(self) -> Mapping[str, p.AdapterUsage]:
        return self._registry.usage()
