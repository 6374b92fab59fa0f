"""The fleet's truth on disk: the directory of one server, and the merge that is active.

    merge.json                 the base's generation and what is merged into it

beside what ``StateDir`` says. A single server reads the same registrations and no merge.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from turret.fleet.fleet_state import Base, Member, MergePlan
from turret.server import log
from turret.server.adapters.source import Source
from turret.server.adapters.state.saved_registration import SavedRegistration
from turret.server.adapters.state.state_dir import StateDir
from turret.server.basics.files import (
    move_directory,
    remove_directory,
    replace_file,
    reporting_disk_faults,
)

_log = logging.getLogger(__name__)


class FleetStore:
    """See ``Store``.

    Args:
        path: The state directory; made if it does not exist.
        is_first: Nobody is at work on uploads yet, so that what a crash left can go.

    Raises:
        OSError: It cannot be used.
        ValueError: Another server or registry uses it.
    """

    def __init__(self, path: Path, *, is_first: bool) -> None:
        # The limit of 0 is unused: replicas receive uploads and enforce their size.
        self._state = StateDir(path, 0)
        self._is_first = is_first
        self._merge = self._state.path / "merge.json"

    def close(self) -> None:
        """Releases the directory for another registry."""
        self._state.close()

    def bind(self, base_name: str, base_digest: str) -> None:
        """Ties the directory to a base model; ValueError if it belongs to another."""
        self._state.bind(base_name, base_digest)

    def read(self) -> list[SavedRegistration]:
        """Every registration, by name."""
        return self._state.read(sweeps=self._is_first)

    def read_base(self) -> Base:
        """The saved base; an unreadable one is reported and replaced by the model's own."""
        if not self._merge.exists():
            return Base()
        try:
            return _base_from(json.loads(self._merge.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.error("cannot restore", extra=log.fields(file=self._merge, reason=error))
            return Base()

    def save_base(self, base: Base) -> None:
        """Saves the base for the next start.

        Raises:
            StorageFullError, StorageFailedError: What was saved before still holds.
        """
        fields = {**dataclasses.asdict(base), "version": 1}
        with reporting_disk_faults():
            replace_file(self._merge, json.dumps(fields, indent=1).encode())

    def save(self, saved: SavedRegistration) -> None:
        """As ``StateDir.write``."""
        self._state.write(saved)

    def remove(self, name: str) -> None:
        """As ``StateDir.remove``."""
        self._state.remove(name)

    def adopt(self, source: Source, key: str) -> Source:
        """Moves an upload to its place; returns where it is now."""
        target = self._state.path / "files" / key
        with reporting_disk_faults():
            if target.exists():
                # A crash left it before its generation was recorded, so nothing refers to it.
                remove_directory(target)
            move_directory(self._state.path / source.path, target)
        return dataclasses.replace(source, path=str(target.relative_to(self._state.path)))

    def discard(self, source: Source) -> None:
        """As ``StateDir.discard``."""
        self._state.discard(source)


def _base_from(fields: dict[str, Any]) -> Base:
    if fields["version"] != 1:
        raise ValueError("is of another version")
    merge = fields["merge"]
    if merge is not None:
        members = tuple(Member(**member) for member in merge.pop("members"))
        merge = MergePlan(members=members, **merge)
    return Base(generation=int(fields["generation"]), merge=merge)
