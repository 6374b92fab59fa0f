"""A change of the base weights that waits until no request runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from turret.server.adapters.base import ChangedBase
from turret.server.errors import UnavailableError
from turret.server.words import say

Change = Callable[[], ChangedBase]


class BaseChange:
    """Made once, on the engine thread, or never.

    Args:
        change: Gives the model its other weights.

    Attributes:
        outcome: Done when the engine goes on with the new weights; UnavailableError if it ends
            first. Whoever cancels it before the change begins withdraws the change.
    """

    def __init__(self, change: Change) -> None:
        self.outcome: Future[None] = Future()
        self._change = change

    @property
    def is_withdrawn(self) -> bool:
        return self.outcome.cancelled()

    def make(self) -> ChangedBase | None:
        """Change the weights, unless it was withdrawn: then None.

        What ``change`` raises is a failure of the engine: nobody knows which weights it has.
        """
        if not self.outcome.set_running_or_notify_cancel():
            return None
        try:
            return self._change()
        except BaseException:
            self.outcome.set_exception(UnavailableError(say("ENGINE_FAILED")))
            raise

    def complete(self) -> None:
        """The engine has taken note of the change that was made."""
        self.outcome.set_result(None)

    def refuse(self) -> None:
        """The engine ends before the change could be made."""
        if self.outcome.set_running_or_notify_cancel():
            self.outcome.set_exception(UnavailableError(say("SHUTTING_DOWN")))
