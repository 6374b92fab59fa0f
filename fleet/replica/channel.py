"""A replica's connection to the registry, and waiting for its proposals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from turret.fleet import messages as m
from turret.server.basics.work import Cancellation
from turret.server.errors import TurretError

_WAIT_SECONDS = 2.0
# Merges check for cancellation more often, because their callers may disconnect.
_CANCEL_SECONDS = 0.2


class Channel(Protocol):
    """The methods of ``RegistryHost``. Each blocks.

    Every method raises UnavailableError if the registry cannot be reached; whether a proposal was
    accepted is then not known.
    """

    def join(self, join: m.Join) -> m.Joined: ...
    def report(self, report: m.Report, wait_seconds: float) -> m.News: ...
    def submit(self, proposal: m.Proposal) -> str: ...
    def outcome(self, operation: str, wait_seconds: float) -> m.Outcome | None: ...
    def cancel(self, operation: str, error: TurretError) -> None: ...
    def leave(self, replica: str) -> None: ...
    def usage(self, name: str = "") -> Mapping[str, Mapping[str, m.Usage]]: ...


def propose(
    channel: Channel, proposal: m.Proposal, cancellation: Cancellation | None = None
) -> m.Outcome:
    """Proposes a change and waits until every living replica has applied it.

    Args:
        channel: To the registry.
        proposal: What is wanted.
        cancellation: Set when nobody waits any more; a merge that is not everywhere yet is
            withdrawn then.

    Raises:
        TurretError: It came to nothing.
        UnavailableError: The registry cannot be reached, or was started anew meanwhile.
    """
    operation = channel.submit(proposal)
    is_withdrawn = False
    while True:
        if cancellation is not None and cancellation.is_set and not is_withdrawn:
            is_withdrawn = True
            try:
                cancellation.check()
            except TurretError as error:
                channel.cancel(operation, error)
        seconds = _WAIT_SECONDS if cancellation is None else _CANCEL_SECONDS
        outcome = channel.outcome(operation, seconds)
        if outcome is not None:
            return outcome
