"""Merges on one replica: it prepares and exchanges weights when the registry asks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from turret.fleet import messages as m
from turret.fleet.fleet_state import Base, Member, MergePlan
from turret.fleet.replica.channel import Channel, propose
from turret.fleet.replica.registry import ReplicaRegistry
from turret.server import log
from turret.server.adapters.base import BaseModel, Precision
from turret.server.adapters.merge.merger import (
    ChangeBase,
    Edit,
    MergeMetrics,
    Merger,
    PreparedMerge,
)
from turret.server.adapters.merge.state import MergeState
from turret.server.adapters.ref import AdapterRef
from turret.server.basics.work import Cancellation
from turret.server.errors import (
    InvalidRequestError,
    MergeActiveError,
    TurretError,
    UnavailableError,
)

_log = logging.getLogger(__name__)


class ReplicaMerger(Merger):
    """See ``Merger``.

    Args:
        registry, edit, describe, change_base, metrics: As there.
        channel: To the fleet's registry.
    """

    def __init__(
        self,
        registry: ReplicaRegistry,
        *,
        edit: Callable[[Precision], Edit],
        describe: Callable[[int], BaseModel],
        change_base: ChangeBase,
        metrics: MergeMetrics,
        channel: Channel,
    ) -> None:
        super().__init__(
            registry, edit=edit, describe=describe, change_base=change_base, metrics=metrics
        )
        self._channel = channel
        self.on_prepared: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._plan: MergePlan | None = None
        self._cancellation = Cancellation()
        self._making: threading.Thread | None = None
        self._answers: dict[str, TurretError | None] = {}
        self._made: PreparedMerge | None = None

    # Requests of callers

    def merge(
        self, refs: Sequence[AdapterRef], precision: Precision | None, cancellation: Cancellation
    ) -> MergeState:
        """As ``Merger.merge``, on every replica or on none.

        Raises:
            UnavailableError: The registry cannot be reached.
        """
        if not refs:
            raise InvalidRequestError.of("adapters", "at least one member")
        # Try the merge here first, to find out how it can be done. All replicas then do the same.
        with self._only_change():
            if self._state.merge is not None:
                raise MergeActiveError("a merge is active")
            tried = self._prepare(refs, precision, cancellation)
            self._registry.release(tried.mix)
        members = tuple(
            Member(name=a.name, uuid=a.uuid, generation=a.generation, weight=a.weight)
            for a in tried.merge.adapters
        )
        proposal = m.Merge(members=members, precision=tried.merge.precision, time=time.time())
        del tried
        propose(self._channel, proposal, cancellation)
        return self._state

    def unmerge(self, cancellation: Cancellation) -> MergeState:
        """As ``Merger.unmerge``, on every replica."""
        propose(self._channel, m.Unmerge(), cancellation)
        return self._state

    # Instructions of the registry

    def prepare(self, plan: MergePlan | None) -> None:
        """Begins to prepare a plan's weights on a thread of its own; None gives them up."""
        with self._lock:
            if plan is not None and self._plan is not None and plan.uuid == self._plan.uuid:
                return
        self._give_up()
        if plan is None:
            return
        with self._lock:
            self._plan, self._cancellation = plan, Cancellation()
            self._making = threading.Thread(
                target=self._make, args=(plan, self._cancellation), name="merge", daemon=True
            )
            self._making.start()

    def prepared(self) -> Mapping[str, TurretError | None]:
        """By plan: None if its weights are ready, or why they cannot be made."""
        with self._lock:
            return dict(self._answers)

    def _make(self, plan: MergePlan, cancellation: Cancellation) -> None:
        error: TurretError | None = None
        made: PreparedMerge | None = None
        try:
            made = self._prepare(_refs(plan), plan.precision, cancellation)
        except TurretError as refused:
            error = refused
        except Exception:
            _log.exception("a merge failed", extra=log.fields(plan=plan.uuid))
            error = UnavailableError("a replica failed to make the merged weights; see its log")
        with self._lock:
            if self._plan is plan and not cancellation.is_set:
                self._made, made = made, None
                self._answers = {plan.uuid: error}
        if made is not None:
            self._registry.release(made.mix)
        self.on_prepared()

    def _give_up(self) -> None:
        with self._lock:
            self._cancellation.set(UnavailableError("the merge was given up"))
            making, self._making, self._plan = self._making, None, None
        if making is not None:
            making.join()
        with self._lock:
            made, self._made, self._answers = self._made, None, {}
        if made is not None:
            self._registry.release(made.mix)

    def follow(self, base: Base) -> None:
        """Switches to this base; blocks until the engine has exchanged the weights.

        Raises:
            TurretError: The weights cannot be made, so that the replica cannot serve.
            UnavailableError: The engine stops.
        """
        plan = base.merge
        if base.generation == self._state.base_generation:
            return
        if self._active is not None:
            # Unmerge and merge: in between, the base has a number that no other state uses.
            number = base.generation if plan is None else -base.generation
            with self._turn:
                self._apply(self._active, None, Cancellation(), number)
        if plan is None:
            self._give_up()
            if base.generation != self._state.base_generation:
                self._renumber(base.generation)
            return
        with self._lock:
            is_ready = self._made is not None and self._plan == plan
        if not is_ready:
            self.prepare(plan)
            making = self._making
            if making is not None:
                making.join()
        with self._lock:
            made, self._made = self._made, None
            error = self._answers.get(plan.uuid)
        if made is None:
            raise error or UnavailableError("the merged weights were given up")
        try:
            with self._turn:
                self._apply(made.edit, made.merge, Cancellation(), base.generation)
        finally:
            self._registry.release(made.mix)
            self._give_up()

    def _renumber(self, generation: int) -> None:
        """Gives the same weights another number, after a merge that came and went meanwhile."""
        outcome = self._change_base(lambda: self._registry.change_base(self._describe(generation)))
        outcome.result()
        self._state = MergeState(generation)


def _refs(plan: MergePlan) -> list[AdapterRef]:
    return [
        AdapterRef(name=member.name, generation=member.generation, weight=member.weight)
        for member in plan.members
    ]
