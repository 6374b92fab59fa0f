"""A server without ``--state-dir``: nothing survives a restart, nothing is uploaded or fused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from turret.server.adapters.adapter import Adapter
from turret.server.adapters.source import Source
from turret.server.adapters.state.saved_registration import SavedRegistration
from turret.server.adapters.state.staged_upload import StagedUpload, UploadedFile
from turret.server.errors import StateDirRequiredError
from turret.server.words import say


class NoStateDir:
    """Replaces ``StateDir``; see there."""

    path: Path | None = None

    def close(self) -> None:
        pass

    def read(self) -> list[SavedRegistration]:
        return []

    def save(self, adapter: Adapter, *, pinned: bool, source: Source | None = None) -> None:
        pass

    def remove(self, name: str) -> None:
        pass

    def discard(self, source: Source) -> None:
        pass

    def stage(self, files: Sequence[UploadedFile]) -> StagedUpload:
        raise _required()

    def check_room(self, num_bytes: int) -> None:
        raise _required()

    def staged_source(self, staged: StagedUpload, name: str) -> Source:
        raise _required()

    def adopt(self, staged: StagedUpload, adapter: Adapter) -> NoReturn:
        raise _required()


def _required() -> StateDirRequiredError:
    return StateDirRequiredError(say("STATE_DIR_REQUIRED"))
