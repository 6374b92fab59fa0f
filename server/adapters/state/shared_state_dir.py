"""A fleet's state directory, as its replicas see it: they read it, and one registry writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from turret.server.adapters.source import Source
from turret.server.adapters.state.no_state_dir import NoStateDir
from turret.server.adapters.state.staged_upload import StagedUpload, UploadedFile
from turret.server.adapters.state.state_dir import check_room_in, source_of, stage_below


class SharedStateDir(NoStateDir):
    """Takes in uploads, and saves, moves and removes nothing.

    Args:
        path: The directory, which the registry has made.
        max_upload_bytes: Most bytes of one upload.
    """

    def __init__(self, path: Path, max_upload_bytes: int) -> None:
        self._path = self.path = path.resolve()
        self._max_upload_bytes = max_upload_bytes

    def stage(self, files: Sequence[UploadedFile]) -> StagedUpload:
        """As ``StateDir.stage``."""
        self.check_room(sum(file.size_bytes for file in files))
        return stage_below(self._path / "incoming", files)

    def check_room(self, num_bytes: int) -> None:
        """As ``StateDir.check_room``."""
        check_room_in(self._path, num_bytes, self._max_upload_bytes)

    def staged_source(self, staged: StagedUpload, name: str) -> Source:
        """As ``StateDir.staged_source``."""
        return source_of(staged, self._path, name)
