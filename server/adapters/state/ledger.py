"""What of the registry is written down, if there is a state directory."""

from __future__ import annotations

from collections.abc import Sequence

from turret.server.adapters.adapter import Adapter
from turret.server.adapters.source import Source
from turret.server.adapters.state.saved_registration import SavedRegistration
from turret.server.adapters.state.staged_upload import StagedUpload, UploadedFile
from turret.server.adapters.state.state_dir import StateDir
from turret.server.errors import StateDirRequiredError


class Ledger:
    """Writes to the state directory, or nowhere if there is none (None)."""

    def __init__(self, state: StateDir | None) -> None:
        self._state = state

    def close(self) -> None:
        """Lets another server use the directory; nothing may be written any more."""
        if self._state is not None:
            self._state.close()

    def read(self) -> list[SavedRegistration]:
        """What was registered when the server ended, however it ended."""
        return [] if self._state is None else self._state.read()

    def save(self, adapter: Adapter, *, pinned: bool, source: Source | None = None) -> None:
        """Makes this generation what its name stands for after a restart.

        Raises:
            StorageFullError: The disk is full; what was saved before still holds.
        """
        if self._state is not None:
            saved = SavedRegistration(
                name=adapter.name,
                uuid=adapter.uuid,
                generation=adapter.generation,
                pinned=pinned,
                source=source or adapter.source,
                facts=adapter.facts,
            )
            self._state.save(saved)

    def remove(self, name: str) -> None:
        """Forgets a name."""
        if self._state is not None:
            self._state.remove(name)

    def stage(self, files: Sequence[UploadedFile]) -> StagedUpload:
        """See ``AdapterRegistry.stage``."""
        return self.require_place().stage(files)

    def require_place(self) -> StateDir:
        """Where files of the server's own go.

        Raises:
            StateDirRequiredError: Nowhere.
        """
        if self._state is None:
            raise StateDirRequiredError(
                "uploaded and fused adapters need a place on the server: start it with --state-dir"
            )
        return self._state

    def staged_source(self, staged: StagedUpload) -> Source:
        """Where a finished upload can be read from until it is adopted."""
        assert self._state is not None, "something was staged"
        return self._state.staged_source(staged)

    def adopt(self, staged: StagedUpload, adapter: Adapter) -> None:
        """Moves a finished upload to its place and points the adapter there."""
        assert self._state is not None, "something was staged"
        adapter.source = self._state.adopt(staged, adapter.key)

    def discard(self, source: Source) -> None:
        """Removes a generation's files if they were uploaded; others belong to the operator."""
        if self._state is not None and source.is_upload:
            self._state.discard(source)
