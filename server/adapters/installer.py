"""Registers files as a generation, or leaves everything as it was."""

from __future__ import annotations

import logging
import uuid as uuids
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from turret.server import log
from turret.server.adapters.adapter import (
    Adapter,
    AdapterFacts,
    AdapterRef,
    HostResult,
    OwnTemplate,
    Source,
    TokenizerFiles,
    origin_of,
    template_of,
)
from turret.server.adapters.checkpoint import AdapterCheckpoint
from turret.server.adapters.component import component_refs
from turret.server.adapters.leases import Leases
from turret.server.adapters.loader import (
    AdapterLoader,
    CheckTokenizer,
    LoadedAdapter,
    changed,
    lost,
)
from turret.server.adapters.name_table import (
    NameTable,
    Registration,
    generation_for_rollback,
    name_taken,
)
from turret.server.adapters.state_dir import NoStateDir, StagedUpload
from turret.server.errors import (
    AdapterCheckpointError,
    AdapterNotFoundError,
    BudgetExceededError,
)
from turret.server.words import say


class AdapterTokenizers:
    """Finds adapters with their own tokenizer or chat template, and their files. Thread-safe."""

    def __init__(self, table: NameTable, loader: AdapterLoader) -> None:
        self._table = table
        self._loader = loader

    def check_with(self, check: CheckTokenizer) -> None:
        """Set the check of tokenizers and templates of adapters that are loaded from now on."""
        self._loader.check_tokenizer = check

    def find(self, refs: Iterable[AdapterRef]) -> tuple[Adapter | None, str]:
        """The first adapter of a mix that has its own tokenizer, and the mix's chat template.

        Unknown names and generations are ignored. The adapter is not held: a name may stand for
        another generation when its request is submitted.
        """
        found: list[Adapter] = []
        for ref in refs:
            with suppress(AdapterNotFoundError):
                found.append(self._table.resolve(ref, suggests=False)[1])
        own = next((adapter for adapter in found if adapter.facts.tokenizer), None)
        return own, template_of(adapter.facts for adapter in found)

    def read(self, adapter: Adapter) -> TokenizerFiles:
        """The tokenizer files of an adapter that has its own tokenizer; blocks.

        Raises:
            AdapterChangedError: The files have changed since the load, or are missing.
        """
        try:
            files = self._loader.read_tokenizer(adapter.source)
        except AdapterCheckpointError as error:
            raise lost(adapter.name, adapter.source, error) from None
        digest = "" if files is None else files.digest
        if files is None or digest != adapter.facts.tokenizer:
            raise changed(adapter.name, adapter.source, adapter.facts.tokenizer, digest)
        return files


_log = logging.getLogger(__name__)

PIN_TIMEOUT_SECONDS = 60.0
RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWeights:
    """Files to be registered under a name.

    Attributes:
        name: A well-formed name.
        source: The present location of the files.
        staged: The upload that contains ``source``; the installer moves it to its final place.
        pinned: Whether to pin the new weights.
        replace: If True, the name must be registered already. If False, it must be free or have the
            same content.
        expected_generation: The generation that the files replace; None for any.
        chat_template: The chat template to use instead of the one in the files.
    """

    name: str
    source: Source
    staged: StagedUpload | None = None
    pinned: bool = False
    replace: bool = False
    expected_generation: int | None = None
    chat_template: OwnTemplate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Installer:
    """Installs generations and pins them in host memory.

    Call every method under the name's lock, so that the current generation stays current.
    """

    loader: AdapterLoader
    table: NameTable
    leases: Leases
    state: NoStateDir

    def install(self, new: NewWeights) -> Registration:
        """Reads files and registers them.

        Raises:
            AdapterNotFoundError, AdapterExistsError: See ``NewWeights.replace``.
            AdapterInUseError: The name is being unloaded, or a fusion needs its present weights.
            AdapterCheckpointError, AdapterMismatchError, AdapterComponentError,
                BudgetExceededError, StorageFullError: The new weights cannot be registered.
        """
        name = new.name
        before = self.table.find(name) if new.replace else self.table.get(name)
        if before is not None:
            self.table.check_active(before)
        checkpoint = self._read(new)
        if before is not None and before.current.facts.content == checkpoint.content:
            self._confirm(before, new)
            return before
        if before is not None and not new.replace:
            raise name_taken(name, before.current.digest)
        digests = [ref.digest for ref in component_refs(checkpoint.config)]
        with (
            self.table.awaiting(digests),
            nullcontext() if before is None else self.table.replacing(before),
        ):
            loaded = self.loader.lower(checkpoint)
            # Entering the adapter may wait for memory, so free the checkpoint's weights first.
            del checkpoint
            put = None if new.staged is None else new.staged.move
            return self._enter(new, loaded, before, put)

    def publish(
        self, name: str, source: Source, loaded: LoadedAdapter, put: Callable[[Path], object]
    ) -> Registration:
        """Registers an adapter that this server has made; see ``AdapterRegistry.publish``."""
        before = self.table.get(name)
        if before is not None:
            self.table.check_active(before)
            if before.current.facts.content == loaded.facts.content:
                return before
        self.loader.check_size(name, loaded.operators)
        new = NewWeights(name=name, source=source)
        with nullcontext() if before is None else self.table.replacing(before):
            return self._enter(new, loaded, before, put)

    def roll_back(self, registration: Registration, generation: int | None) -> None:
        """Makes a kept generation current; see ``AdapterRegistry.rollback``."""
        self.table.check_active(registration)
        old = registration.current
        adapter = generation_for_rollback(registration, generation)
        if adapter is old:
            return
        # Read the adapter first, to find changed files before anything changes here.
        with self.table.replacing(registration), self.resident(adapter):
            self.table.check_active(registration)
            kept = self.table.kept_after(registration, adapter)
            self.state.save(adapter, pinned=old.pinned, kept=kept)
            self.leases.set_pinned(adapter, old.pinned)
            self.table.swap(registration, adapter, kept)

    def inspect(self, new: NewWeights) -> AdapterFacts:
        """Reads files as ``install`` does and raises the same errors, but keeps nothing."""
        return self.loader.lower(self._read(new)).facts

    def pin(self, registration: Registration) -> None:
        """Pins the current generation; see ``AdapterRegistry.pin``."""
        self.table.check_active(registration)
        adapter = registration.current
        with self.resident(adapter):
            self.table.check_active(registration)
            self.state.save(adapter, pinned=True, kept=registration.kept)
            self.leases.set_pinned(adapter, True)

    def unpin(self, registration: Registration) -> None:
        """Undoes ``pin``."""
        adapter = registration.current
        if adapter.pinned:
            self.state.save(adapter, pinned=False, kept=registration.kept)
            self.leases.set_pinned(adapter, False)

    def _read(self, new: NewWeights) -> AdapterCheckpoint:
        checkpoint = self.loader.read_new(new.source, new.chat_template)
        origin = origin_of(checkpoint.chat_template) or "the base model's"
        said = log.fields(adapter=new.name, digest=checkpoint.digest, chat_template=origin)
        _log.info("adapter read", extra=said)
        return checkpoint

    @contextmanager
    def resident(self, adapter: Adapter) -> Iterator[None]:
        """Holds a generation in host memory, and reads it first if it is on disk.

        Raises:
            AdapterChangedError, BudgetExceededError: See ``AdapterRegistry.pin``.
        """
        mix = self.table.open([(adapter, 1.0)])
        try:
            answer: Future[HostResult] = Future()
            if not mix.ensure_host(answer.set_result):
                try:
                    result = answer.result(PIN_TIMEOUT_SECONDS)
                except TimeoutError:
                    raise _no_room(adapter) from None
                if result.error is not None:
                    raise result.error
            yield
        finally:
            self.table.release(mix)

    def _enter(
        self,
        new: NewWeights,
        loaded: LoadedAdapter,
        before: Registration | None,
        put: Callable[[Path], object] | None,
    ) -> Registration:
        """Registers lowered weights under the name, or as its next generation."""
        if before is None:
            uuid, generation, pinned = uuids.uuid4().hex, 1, new.pinned
        else:
            uuid, generation = before.uuid, before.next_generation
            pinned = new.pinned or before.current.pinned
        adapter = Adapter(new.name, uuid, generation, new.source, loaded.facts)
        self._admit(adapter, loaded, put, pinned, before)
        if before is None:
            before = Registration(adapter)
            self.table.add(before)
        else:
            self.table.swap(before, adapter, self.table.kept_after(before, adapter))
        return before

    def _confirm(self, registration: Registration, new: NewWeights) -> None:
        """Accepts content that is registered already, from the same source or another one."""
        adapter, source = registration.current, new.source
        self.table.check_active(registration)
        if source != adapter.source and not (source.is_upload or adapter.source.is_upload):
            # The new path was just read and contains these files, whereas the old one may be gone.
            self.state.save(adapter, pinned=adapter.pinned, kept=registration.kept, source=source)
            adapter.source = source
        if new.pinned:
            self.pin(registration)

    def _admit(
        self,
        adapter: Adapter,
        loaded: LoadedAdapter,
        put: Callable[[Path], object] | None,
        pinned: bool,
        replaced: Registration | None,
    ) -> None:
        """Puts the adapter into memory first, because that may fail, and then on disk.

        The caller adds the name.
        """
        try:
            self.leases.insert(adapter, loaded)
            if pinned:
                with self.resident(adapter):
                    self.leases.set_pinned(adapter, True)
            if put is not None:
                self.state.adopt(adapter, put)
            kept: tuple[Adapter, ...] = ()
            if replaced is not None:
                self.table.check_active(replaced)
                kept = self.table.kept_after(replaced, adapter)
            self.state.save(adapter, pinned=pinned, kept=kept)
        except BaseException:
            self.leases.forget(adapter, "error")
            self.state.discard(adapter.source)
            raise


def _no_room(adapter: Adapter) -> BudgetExceededError:
    text = say("NO_ROOM_TO_PIN", adapter=adapter.name, bytes=adapter.host_bytes_needed)
    return BudgetExceededError(text, retry_after_seconds=RETRY_SECONDS)
