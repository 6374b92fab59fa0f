"""What callers wait for: proposals that are accepted and not yet true everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from turret.fleet.messages import Outcome
from turret.server.adapters.source import Source
from turret.server.adapters.state.saved_registration import SavedRegistration
from turret.server.errors import TurretError, UnavailableError

# Outcomes that nobody has asked for are kept for so many later ones.
_KEPT = 4096

Stage = Literal["applying", "draining", "preparing", "done"]


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
        saved: What is being unloaded.
        plan: The uuid of the merge that is being prepared.
        is_forced: Running requests are ended.
        deadline: When an unload gives up; None is never.
        timeout_seconds: What the caller said.
    """

    id: str
    stage: Stage
    revision: int
    outcome: Outcome = field(default_factory=Outcome)
    error: TurretError | None = None
    saved: SavedRegistration | None = None
    plan: str = ""
    is_forced: bool = False
    deadline: float | None = None
    timeout_seconds: float | None = None

    def end(self, error: TurretError | None = None) -> None:
        self.stage, self.error = "done", error


@dataclass(frozen=True, slots=True)
class Leftover:
    """Files of a generation that is gone, for when nobody reads them any more."""

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
        """Those that are in a stage."""
        return (o for o in list(self._by_id.values()) if o.stage == stage)
