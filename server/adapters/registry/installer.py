"""Turns files into a registered generation, or leaves everything as it was."""

from __future__ import annotations

import logging
import uuid as uuids
from contextlib import nullcontext

from turret.server import log
from turret.server.adapters.adapter import Adapter
from turret.server.adapters.chat_template import OwnTemplate, origin_of
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint
from turret.server.adapters.component import component_refs
from turret.server.adapters.facts import AdapterFacts
from turret.server.adapters.registry.name_table import NameTable, name_taken
from turret.server.adapters.registry.pins import Pins
from turret.server.adapters.registry.registration import Registration
from turret.server.adapters.residency.leases import Leases
from turret.server.adapters.residency.loader import AdapterLoader, LoadedAdapter
from turret.server.adapters.source import Source
from turret.server.adapters.state.no_state_dir import NoStateDir
from turret.server.adapters.state.staged_upload import StagedUpload
from turret.server.adapters.state.state_dir import StateDir
from turret.server.errors import TurretError

_log = logging.getLogger(__name__)


class Installer:
    """Call ``install`` under the name's lock."""

    def __init__(
        self,
        loader: AdapterLoader,
        table: NameTable,
        *,
        leases: Leases,
        state: StateDir | NoStateDir,
        pins: Pins,
    ) -> None:
        self._loader = loader
        self._table = table
        self._leases = leases
        self._state = state
        self._pins = pins

    def install(
        self,
        name: str,
        source: Source,
        *,
        staged: StagedUpload | None = None,
        pinned: bool = False,
        replace: bool = False,
        chat_template: OwnTemplate | None = None,
    ) -> Registration:
        """Reads ``source`` and registers it under ``name``.

        Args:
            name: Well-formed.
            source: Where the files are now.
            staged: The upload that ``source`` lies in; it is moved to its place.
            pinned: Whether to pin it too.
            replace: Whether the name must be registered already. If not, it must not be, unless
                with the same content.
            chat_template: The chat template to use instead of the one in the files.

        Raises:
            AdapterNotFoundError, AdapterExistsError: As ``replace`` says.
            AdapterInUseError: The name is being unloaded, or a fusion needs the weights it has.
            AdapterCheckpointError, AdapterMismatchError, AdapterComponentError,
                BudgetExceededError, StorageFullError: The new weights cannot be taken.
        """
        before = self._table.find(name) if replace else self._table.get(name)
        if before is not None:
            self._table.check_active(before)
        checkpoint = self._read(name, source, chat_template)
        if before is not None and before.current.facts.content == checkpoint.content:
            self._confirm(before, source, pinned)
            return before
        if before is not None and not replace:
            raise name_taken(name, before.current.digest)
        digests = [ref.digest for ref in component_refs(checkpoint.config)]
        with (
            self._table.awaiting(digests),
            nullcontext() if before is None else self._table.replacing(before),
        ):
            loaded = self._loader.lower(checkpoint)
            # Entering the adapter may wait for memory; free the checkpoint's weights before.
            del checkpoint
            return self._enter(name, source, loaded, before, staged=staged, pinned=pinned)

    def inspect(
        self, name: str, source: Source, chat_template: OwnTemplate | None = None
    ) -> AdapterFacts:
        """Reads files as ``install`` would, and keeps nothing of them; errors as there."""
        return self._loader.lower(self._read(name, source, chat_template)).facts

    def _read(
        self, name: str, source: Source, chat_template: OwnTemplate | None
    ) -> AdapterCheckpoint:
        checkpoint = self._loader.read_new(source, chat_template)
        origin = origin_of(checkpoint.chat_template) or "the base model's"
        _log.info("adapter read", extra=log.fields(adapter=name, chat_template=origin))
        return checkpoint

    def _enter(
        self,
        name: str,
        source: Source,
        loaded: LoadedAdapter,
        before: Registration | None,
        *,
        staged: StagedUpload | None,
        pinned: bool,
    ) -> Registration:
        """Registers lowered weights under the name, or as its next generation."""
        if before is None:
            adapter = Adapter(name, uuids.uuid4().hex, 1, source, loaded.facts)
            self._admit(adapter, loaded, staged, pinned)
            registration = Registration(adapter)
            self._table.add(registration)
        else:
            registration, old = before, before.current
            adapter = Adapter(name, old.uuid, old.generation + 1, source, loaded.facts)
            self._admit(adapter, loaded, staged, pinned or old.pinned, replaced=registration)
            self._table.swap(registration, adapter)
        return registration

    def _confirm(self, registration: Registration, source: Source, pinned: bool) -> None:
        """Accepts content that is registered already, from the same or another place."""
        adapter = registration.current
        self._table.check_active(registration)
        if source != adapter.source and not (source.is_upload or adapter.source.is_upload):
            # The new path was just read and holds the content, whereas the old one may be gone.
            self._state.save(adapter, pinned=adapter.pinned, source=source)
            adapter.source = source
        if pinned:
            self._pins.pin(registration)

    def _admit(
        self,
        adapter: Adapter,
        loaded: LoadedAdapter,
        staged: StagedUpload | None,
        pinned: bool,
        replaced: Registration | None = None,
    ) -> None:
        """Enters memory first, because that may fail, then the disk. The caller enters the name."""
        try:
            self._leases.insert(adapter, loaded)
            if pinned:
                self._pins.hold(adapter)
            if staged is not None:
                self._state.adopt(staged, adapter)
            if replaced is not None:
                self._table.check_active(replaced)
            self._state.save(adapter, pinned=pinned)
        except BaseException:
            self._withdraw(adapter, replaced)
            raise

    def _withdraw(self, adapter: Adapter, replaced: Registration | None) -> None:
        self._leases.forget(adapter, "error")
        try:
            if replaced is None:
                self._state.remove(adapter.name)
            else:
                self._state.save(replaced.current, pinned=replaced.current.pinned)
        except (OSError, TurretError) as error:
            # The earlier write failed, so most likely there is nothing on disk to undo.
            _log.warning("cannot undo", extra=log.fields(adapter=adapter.name, reason=error))
        self._state.discard(adapter.source)
