"""Runs the registry in a process or an actor, with a clock, a thread, and its state on disk.

The state directory has the files that ``StateDir`` describes, and one more:

    merge.json                 the base's generation, and the mix that is merged into it

A single server can read the same registrations; it ignores the merge.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

from turret.fleet import protocol as p
from turret.fleet.follower import Channel
from turret.fleet.registry import FleetRegistry, Store
from turret.server import log
from turret.server.adapters.adapter import Source
from turret.server.adapters.state_dir import StateDir
from turret.server.basics.files import (
    move_directory,
    remove_directory,
    replace_file,
    reporting_disk_faults,
)

_log = logging.getLogger(__name__)

_TICK_SECONDS = 0.2


class FleetStore(StateDir):
    """A state directory as a single server has it, with the fleet's merge; see ``Store``.

    Args:
        path: The state directory; created if it does not exist.

    Raises:
        OSError: The directory cannot be used.
        ValueError: Another server or registry uses the directory.
    """

    def __init__(self, path: Path) -> None:
        # The limit of 0 is unused: replicas receive uploads and enforce their size.
        super().__init__(path, 0)
        self._merge = self.path / "merge.json"

    def read_base(self) -> p.FleetBase:
        """The saved base, or the model's own if reading fails; logs the failure."""
        if not self._merge.exists():
            return p.FleetBase()
        try:
            return _base_from(json.loads(self._merge.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.error("cannot restore", extra=log.fields(file=self._merge, reason=error))
            return p.FleetBase()

    def write_base(self, base: p.FleetBase) -> None:
        """Saves the base for the next start.

        Raises:
            StorageFullError, StorageFailedError: The base was not saved; the last one still is.
        """
        fields = {**dataclasses.asdict(base), "version": 1}
        with reporting_disk_faults():
            replace_file(self._merge, json.dumps(fields, indent=1).encode())

    def keep(self, source: Source, key: str) -> Source:
        """Moves an upload to its permanent place; returns its new source."""
        target = self.path / "files" / key
        with reporting_disk_faults():
            if target.exists():
                # A crash left this directory before its generation was saved: nothing uses it.
                remove_directory(target)
            move_directory(self.path / source.path, target)
        return dataclasses.replace(source, path=str(target.relative_to(self.path)))


def _base_from(fields: dict[str, Any]) -> p.FleetBase:
    if fields["version"] != 1:
        raise ValueError("unsupported version")
    merge = fields["merge"]
    if merge is not None:
        members = tuple(p.MergeMember(**member) for member in merge.pop("members"))
        merge = p.MergePlan(members=members, **merge)
    return p.FleetBase(generation=int(fields["generation"]), merge=merge)


class RegistryHost(Channel):
    """A ``FleetRegistry`` with a clock, and the channel to it within its process. Thread-safe.

    Args:
        store: The state that survives a restart.
        lease_seconds: How long the registry waits for a silent replica.
        is_first: See ``FleetRegistry``.
    """

    def __init__(self, store: Store, *, lease_seconds: float = 5.0, is_first: bool = True) -> None:
        self._changed = threading.Condition()
        self._registry = FleetRegistry(
            store, now=time.monotonic(), lease_seconds=lease_seconds, is_first=is_first
        )
        self._is_closed = False
        threading.Thread(target=self._tick, name="fleet-registry", daemon=True).start()

    def close(self) -> None:
        """Stops the thread that advances operations."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def call(self, wait_seconds: float, method: str, *arguments: Any) -> Any:
        """Calls a method of ``FleetRegistry``, which gets the time as its last argument."""
        end, called = time.monotonic() + wait_seconds, getattr(self._registry, method)
        with self._changed:
            try:
                result = called(*arguments, time.monotonic())
            finally:
                # Other callers may be waiting for what this call has changed.
                self._changed.notify_all()
            if method == "report":
                return self._news(arguments[0], result, end)
            while method == "outcome" and result is None and not self._is_over(end):
                self._changed.wait(end - time.monotonic())
                result = called(*arguments, time.monotonic())
            return result

    def _news(self, report: p.Report, news: p.News, end: float) -> p.News:
        revision = self._registry.revision
        while not news.entries and not self._is_over(end):
            self._changed.wait(end - time.monotonic())
            if self._registry.revision > revision:
                break
        # Do not record the report again: the replica may have died meanwhile.
        return news if news.entries else self._registry.news(report)

    def _is_over(self, end: float) -> bool:
        return self._is_closed or time.monotonic() >= end

    def _tick(self) -> None:
        with self._changed:
            while not self._is_closed:
                self._registry.tick(time.monotonic())
                self._changed.notify_all()
                self._changed.wait(_TICK_SECONDS)
