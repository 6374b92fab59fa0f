"""Keeps a replica in step with the registry: one thread asks for news, another applies it."""

from __future__ import annotations

import logging
import threading
import time

from turret.fleet.follower import Applies, Follower
from turret.fleet.messages import Join, News, NotJoinedError, Report
from turret.fleet.replica.channel import Channel
from turret.server import log
from turret.server.errors import UnavailableError

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5
# Without news, a report waits for this part of a lease, so that two may be lost.
_WAITS_PER_LEASE = 3
# How often to check while something is ending on this replica.
_DRAIN_SECONDS = 0.05


class ReplicaLink:
    """Created stopped. ``start`` blocks until the registry's state is applied.

    Args:
        join: Who the replica is.
        replica: Makes changes true.
        channel: To the registry.
        stops_alone: See ``Follower``.
    """

    def __init__(
        self,
        join: Join,
        replica: Applies,
        channel: Channel,
        *,
        stops_alone: bool = False,
    ) -> None:
        self._name = join.replica
        self._replica = replica
        self._channel = channel
        self._follower = Follower(join, replica, stops_alone=stops_alone)
        self._changed = threading.Condition()
        self._lease_seconds = 1.0
        self._is_closed = False
        self._error: Exception | None = None
        self._is_away = False

    def start(self, timeout_seconds: float) -> None:
        """Joins, and then serves.

        Raises:
            UnavailableError: The registry was not reached in time.
            TurretError, ValueError: What it says cannot be made true, or it refuses the replica.
        """
        for work in (self._watch, self._apply):
            threading.Thread(target=work, name=f"fleet {work.__name__}", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._error or self.is_serving, timeout_seconds)
            if self._error is not None:
                raise self._error
            if not self.is_serving:
                raise UnavailableError("the fleet's registry cannot be reached")

    def close(self) -> None:
        """Leaves the fleet, so that nobody waits for this replica any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        try:
            self._channel.leave(self._name)
        except UnavailableError:
            return

    @property
    def is_serving(self) -> bool:
        """Whether requests may be answered."""
        return self._error is None and self._follower.is_serving(time.monotonic())

    @property
    def has_failed(self) -> bool:
        """Whether a change cannot be applied here, so that the replica must end."""
        return self._error is not None

    def report_soon(self) -> None:
        """Makes the next report go out soon."""
        threading.Thread(target=self._ask, args=(0.0,), name="fleet report", daemon=True).start()

    def _watch(self) -> None:
        while not self._is_closed and self._error is None:
            with self._changed:
                is_busy = bool(self._replica.holding())
            wait = _DRAIN_SECONDS if is_busy else self._lease_seconds / _WAITS_PER_LEASE
            if not self._ask(wait):
                time.sleep(_RETRY_SECONDS)

    def _ask(self, wait_seconds: float) -> bool:
        """Makes one call to the registry; False if it failed."""
        with self._changed:
            question, asked = self._follower.next_call(), time.monotonic()
        try:
            if isinstance(question, Join):
                joined = self._channel.join(question)
                with self._changed:
                    self._follower.joined(joined, asked)
                    self._lease_seconds = joined.lease_seconds
                    self._changed.notify_all()
            else:
                news = self._channel.report(question, wait_seconds)
                self._take(question, news, asked)
        except NotJoinedError:
            if not isinstance(question, Join):
                with self._changed:
                    self._follower.must_join(question)
        except UnavailableError as error:
            if not self._is_away:
                self._is_away = True
                _log.warning("no registry", extra=log.fields(reason=error))
            return False
        except ValueError as error:
            self._fail(error)
            return False
        if self._is_away:
            self._is_away = False
            _log.info("the registry is back")
        return True

    def _take(self, question: Report, news: News, asked: float) -> None:
        with self._changed:
            self._follower.told(question, news, asked)
            self._changed.notify_all()

    def _apply(self) -> None:
        while True:
            with self._changed:
                while (change := self._follower.next_change()) is None:
                    if self._is_closed or self._error is not None:
                        return
                    self._changed.wait()
            try:
                self._follower.apply(change)
            except Exception as error:
                _log.exception("the replica cannot follow the fleet")
                self._fail(error)
                return
            with self._changed:
                self._follower.done(change)
                self._changed.notify_all()
            # Report at once, because callers wait for it.
            self._ask(0.0)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
