"""The adapters of one server: load, upload, replace, pin, unload, restore, resolve for requests.

Every method is thread-safe. Each name is changed by one thread at a time (``NameLocks``). Engine
steps may wait for the registry's lock, so it is never held while a file is read or written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Self

from turret.server import log
from turret.server.adapters.adapter import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    TEMPLATE_FILES,
    TENSORS_FILE,
    TOKENIZER_FILES,
    Adapter,
    AdapterInfo,
    AdapterRef,
    Alias,
    AliasTarget,
    Mix,
    OwnTemplate,
    Source,
    check_alias,
    origin_of,
)
from turret.server.adapters.base import NOTHING_SPECIAL, Allowed, BaseModel, ChangedBase
from turret.server.adapters.checkpoint import (
    Findings,
    digest_of_task,
    digest_with_tokenizer,
)
from turret.server.adapters.checkpoint.adapter_root import AdapterDirectory, AdapterRoot
from turret.server.adapters.checkpoint.reader import begin_digest, parse_config
from turret.server.adapters.checkpoint.tokenizer_files import read_chat_template, tokenizer_digest
from turret.server.adapters.installer import AdapterTokenizers, Installer, NewWeights
from turret.server.adapters.leases import Leases
from turret.server.adapters.loader import AdapterLoader, LoadedAdapter, changed, lost
from turret.server.adapters.lowering import Lowered
from turret.server.adapters.name_table import (
    NameLocks,
    NameTable,
    Registration,
    generation_of,
    registration_of,
)
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.peft_format.config_rules import invalid
from turret.server.adapters.state_dir import NoStateDir, StagedUpload, UploadedFile
from turret.server.basics.names import BASE, is_remote, no_adapter_name
from turret.server.errors import (
    AdapterBusyError,
    AdapterChangedError,
    AdapterCheckpointError,
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterPinnedError,
    InvalidRequestError,
    TurretError,
)
from turret.server.metrics import Metrics
from turret.server.remote import AdapterHub, RemoteAdapters
from turret.server.words import say

CHUNK_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A file to export: its plain name, its size and the SHA-256 of its content in hex."""

    name: str
    size_bytes: int
    sha256: str


class AdapterExport:
    """An adapter's open files, so that an unload or a replacement does not affect the export.

    The constructor reads the files once, to check that they are the ones that were loaded. It
    blocks on the disk. Use the object as a context manager.

    Args:
        root: The directory to which ``source`` is relative.
        source: The location of the files.
        record: The adapter's record for clients.

    Raises:
        AdapterChangedError: The files are not the ones that were loaded.
        AdapterCheckpointError: The files cannot be opened.
    """

    def __init__(self, root: AdapterRoot, source: Source, record: AdapterInfo) -> None:
        self.record = record
        self._source = source
        self._files: dict[str, BinaryIO] = {}
        try:
            with root.open_directory(source.place, source.shown) as directory:
                names = [CONFIG_FILE, TENSORS_FILE]
                beside = TOKENIZER_FILES if record.facts.tokenizer else ()
                if origin_of(record.facts.chat_template) in TEMPLATE_FILES:
                    self._check_template(directory)
                    beside = beside or TEMPLATE_FILES
                names += [name for name in beside if directory.has(name)]
                for name in names:
                    self._files[name] = directory.open_file(name)
            self.files = tuple(_describe(name, file) for name, file in self._files.items())
            self._check_digest()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def chunks(self) -> Iterator[tuple[str, bytes]]:
        """Yield a file's name and its next bytes, file after file.

        Raises:
            AdapterChangedError: A file changed during the export.
        """
        for announced in self.files:
            file = self._files[announced.name]
            file.seek(0)
            digest = hashlib.sha256()
            while data := file.read(CHUNK_BYTES):
                digest.update(data)
                yield announced.name, data
            if digest.hexdigest() != announced.sha256:
                path = f"{self._source.shown}/{announced.name}"
                raise AdapterChangedError(say("CHANGED_DURING_EXPORT", path=path))

    def _check_template(self, directory: AdapterDirectory) -> None:
        facts, findings = self.record.facts, Findings(self._source.shown)
        if read_chat_template(directory, findings) != facts.chat_template or findings.fields:
            raise changed(self.record.name, self._source, facts.digest, facts.digest)

    def _check_digest(self) -> None:
        config = self._files[CONFIG_FILE]
        config.seek(0)
        digest = begin_digest(parse_config(config.read(MAX_CONFIG_BYTES + 1), self._source.shown))
        file = self._files[TENSORS_FILE]
        file.seek(0)
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
        found, facts = digest.hexdigest(), self.record.facts
        if facts.tokenizer:
            found = digest_with_tokenizer(found, self._tokenizer_digest())
        found = digest_of_task(found, self._source.task)
        if found != facts.digest:
            raise changed(self.record.name, self._source, facts.digest, found)

    def _tokenizer_digest(self) -> str:
        read: dict[str, bytes] = {}
        for name, most in TOKENIZER_FILES.items():
            if name in self._files:
                self._files[name].seek(0)
                read[name] = self._files[name].read(most + 1)
        return tokenizer_digest(read)


def _describe(name: str, file: BinaryIO) -> ExportedFile:
    digest = hashlib.sha256()
    size = 0
    while data := file.read(CHUNK_BYTES):
        digest.update(data)
        size += len(data)
    return ExportedFile(name, size, digest.hexdigest())


UnloadMode = Literal["DRAIN", "FORCE"]

_FORCE_AGAIN_SECONDS = 0.25


class Unloads:
    """Unloads adapters: waits until no request uses them, or ends these requests. Thread-safe.

    Args:
        lock: The registry's lock.
        table: The registered names and the adapters in flight.
        names: The locks of the names.
        state: The state directory, from which names and files are removed.
        end_users: Called with the uuid of an adapter whose users must end now; they still have to
            release their mixes.
        on_gone: Called with a generation that no request will use any more.
    """

    def __init__(
        self,
        lock: threading.RLock,
        table: NameTable,
        names: NameLocks,
        state: NoStateDir,
        *,
        end_users: Callable[[str], None],
        on_gone: Callable[[Adapter], None],
    ) -> None:
        self._lock = lock
        self._table = table
        self._names = names
        self._state = state
        self._end_users = end_users
        self._on_gone = on_gone

    def unload(
        self,
        name: str,
        mode: UnloadMode,
        timeout_seconds: float | None,
        expected_generation: int | None,
    ) -> None:
        """See ``AdapterRegistry.unload``."""
        if mode not in ("DRAIN", "FORCE"):
            raise InvalidRequestError.of("mode", invalid(mode, "DRAIN or FORCE"))
        with self._lock:
            registration = self._table.find(name)
            self._table.check_generation(name, expected_generation)
            if registration.current.pinned:
                raise AdapterPinnedError(say("ADAPTER_PINNED", adapter=name))
            self._table.check_not_component(registration)
            self._table.check_not_aliased(registration)
            registration.state = "DELETING"
            registration.unloaders += 1
        try:
            self._wait_until_unheld(registration, mode, timeout_seconds)
            with self._names.only(name):
                self._finish(registration, mode, timeout_seconds)
        finally:
            with self._lock:
                registration.unloaders -= 1
                if registration.unloaders == 0:
                    registration.state = "ACTIVE"

    def _wait_until_unheld(
        self, registration: Registration, mode: str, timeout_seconds: float | None
    ) -> None:
        end = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        while mode == "FORCE" and registration.in_flight:
            # Repeat the call: a request that acquired its adapters just before the name was closed
            # may reach the engine after the first call.
            self._end_users(registration.uuid)
            left = end - time.monotonic()
            self._table.wait_until_unheld(registration, max(min(left, _FORCE_AGAIN_SECONDS), 0.0))
            if left <= 0:
                return
        self._table.wait_until_unheld(registration, timeout_seconds)

    def _finish(self, registration: Registration, mode: str, timeout_seconds: float | None) -> None:
        name = registration.name
        with self._lock:
            if self._table.get(name) is not registration:
                return  # Another call has unloaded it already.
            if registration.in_flight:
                kind = AdapterInUseError if mode == "FORCE" else AdapterBusyError
                count, waited = registration.in_flight, timeout_seconds
                raise kind(say("ADAPTER_HELD", adapter=name, requests=count, seconds=waited))
            if registration.current.pinned:
                raise AdapterPinnedError(say("ADAPTER_PINNED", adapter=name))
            self._table.check_not_aliased(registration)
        # No request can acquire the adapter now: it is being deleted, and changes of the name wait.
        self._state.remove(name)
        self._table.remove(registration)
        for adapter in registration.named:
            self._on_gone(adapter)
            self._state.discard(adapter.source)


_log = logging.getLogger(__name__)

# The key of the lock for all aliases, among the locks of names. No name contains this character.
_ALL_ALIASES = "@"


class AdapterRegistry:
    """All adapters of one base model.

    Args:
        root: Directory that adapters are loaded from; nothing outside is opened. With None, only
            the hub and uploads are available.
        base: The base model as served.
        host_bytes: Budget for operators in host memory, all adapters together.
        max_rank: Highest rank that an adapter may have.
        metrics: The metrics of the server; None for new ones.
        state: Keeps registrations and uploads across restarts. None keeps neither.
        allowed: Exceptions to what is rejected by default.
        hub: Finds adapters whose paths begin with ``hub:``; None rejects such paths.
        remotes: Fetches adapters whose paths begin with ``s3://`` or ``oci://``, which are then
            kept like uploads; None rejects such paths.
        admit: Called with the operators of every adapter that is read; raises if they cannot be
            served.
        keep_generations: The number of replaced generations of a name that requests may still name.

    Attributes:
        on_force_unload: Listeners, called with the uuid of an adapter whose requests must end now.
            The requests still have to release their mixes. Code that acquires mixes adds a
            listener.
        on_unloaded: Called with the key of a generation that is gone (unloaded, or replaced and no
            longer in use), so that copies of its operators can be freed.
        tokenizers: The adapters' own tokenizers and chat templates.
    """

    def __init__(
        self,
        root: Path | None,
        base: BaseModel,
        host_bytes: int,
        max_rank: int,
        metrics: Metrics | None = None,
        *,
        state: NoStateDir | None = None,
        allowed: Allowed = NOTHING_SPECIAL,
        hub: AdapterHub | None = None,
        remotes: RemoteAdapters | None = None,
        admit: Callable[[AdapterOperators], None] = lambda operators: None,
        keep_generations: int = 0,
    ) -> None:
        self._state = kept = NoStateDir() if state is None else state
        self._remotes = remotes or RemoteAdapters()
        self._loader = loader = AdapterLoader(
            root,
            base,
            host_bytes,
            max_rank,
            kept.path,
            find_source=lambda ref: self._table.source_of(ref),
            allowed=allowed,
            hub=hub,
            admit=admit,
        )
        self._lock = lock = threading.RLock()
        self._metrics = metrics or Metrics()
        self._leases = leases = Leases(host_bytes, loader.reload, lock=lock, metrics=self._metrics)
        self._table = table = NameTable(
            lock,
            leases,
            self._metrics,
            self._on_retired_gone,
            keep_generations=keep_generations,
        )
        self.tokenizers = AdapterTokenizers(table, loader)
        self._installer = Installer(loader=loader, table=table, leases=leases, state=kept)
        self._names = names = NameLocks()
        self._unloads = Unloads(
            lock, table, names, kept, end_users=self._end_users, on_gone=self._notify_gone
        )
        self.on_force_unload: list[Callable[[str], None]] = []
        self.on_unloaded: Callable[[str], None] = lambda key: None
        # Removes files on a separate thread, because the last user of a generation may be the
        # engine thread.
        self._janitor = ThreadPoolExecutor(1, thread_name_prefix="adapter-files")

    @property
    def host_bytes_used(self) -> int:
        """Bytes of operators in host memory, including those being read."""
        return self._leases.used_bytes

    @property
    def base(self) -> BaseModel:
        """The base model as served now."""
        return self._loader.base

    def change_base(self, base: BaseModel) -> ChangedBase:
        """Uses another base for later reads. Call it between two steps.

        Operators that were computed from the old base, such as DoRA's gains, are computed again:
        at once if the adapter is held or pinned, otherwise when it is next requested.
        """
        self._loader.base = base
        stale = self._leases.change_base(base.generation)
        return ChangedBase(base.generation, stale)

    def restore(self) -> int:
        """Registers the adapters in the state directory; call it first.

        Only the weights of pinned adapters are read. A pinned adapter that cannot be read is logged
        and left unpinned.

        Returns:
            The number of registered adapters.

        Raises:
            OSError: The directory cannot be read.
        """
        found = self._state.read()
        for saved in found:
            self._table.add(registration_of(saved))
        for alias in self._state.read_aliases():
            try:
                self._check_alias(alias)
            except TurretError as error:
                _log.error("cannot restore", extra=log.fields(alias=alias.name, reason=error))
            else:
                self._put_alias(alias)
        for saved in found:
            if saved.pinned:
                try:
                    self.pin(saved.name)
                except TurretError as error:
                    _log.error("cannot pin", extra=log.fields(adapter=saved.name, reason=error))
        return len(found)

    def load(
        self,
        name: str,
        path: str,
        pinned: bool = False,
        task: int | None = None,
        chat_template: OwnTemplate | None = None,
    ) -> AdapterInfo:
        """Reads an adapter and registers it. Blocks, so do not call it on the engine thread.

        ``path`` is below the adapter root, ``hub:org/name[@revision]``, or remote (``s3://…`` or
        ``oci://…``). The same content under the same name is accepted again, and changes at most
        the pin and the source. ``chat_template`` is used instead of the one in the files.

        Raises:
            InvalidRequestError: The name is malformed, the base's or an alias's.
            AdapterExistsError, AdapterInUseError: The name has other content, or is being unloaded.
            HubError, HubUnavailableError, QueueFullError: The hub's files cannot be downloaded.
            AdapterCheckpointError, AdapterMismatchError, AdapterComponentError: See the loader.
            BudgetExceededError: The rank or size exceeds a limit, or a pinned adapter has no room.
            StorageFullError: The registration cannot be saved.
        """
        with self._changing(name), self._found(name, path, task) as (source, staged):
            return self._put(
                NewWeights(
                    name=name,
                    source=source,
                    staged=staged,
                    pinned=pinned,
                    chat_template=chat_template,
                )
            )

    def replace(
        self,
        name: str,
        path: str,
        expected_generation: int | None = None,
        task: int | None = None,
        chat_template: OwnTemplate | None = None,
    ) -> AdapterInfo:
        """Makes the adapter in ``path`` the next generation of a registered name.

        Requests that hold the previous generation finish on it; the last of them frees it unless it
        is kept. A pinned adapter stays pinned, so both generations must fit in memory at once. The
        same content does not make a new generation. It is read from ``path`` from then on, unless
        the old or the new files are an upload.

        Raises:
            AdapterNotFoundError: The name is not registered.
            AdapterGenerationError: The generation is not the expected one.
            AdapterInUseError: The adapter is being unloaded, or is a component of a fusion.
            AdapterCheckpointError, AdapterMismatchError, AdapterComponentError,
                BudgetExceededError, StorageFullError: See ``load``.
        """
        with self._changing(name):
            self._table.check_generation(name, expected_generation)
            with self._found(name, path, task) as (source, staged):
                return self._put(
                    NewWeights(
                        name=name,
                        source=source,
                        staged=staged,
                        replace=True,
                        expected_generation=expected_generation,
                        chat_template=chat_template,
                    )
                )

    @contextlib.contextmanager
    def _found(
        self, name: str, path: str, task: int | None
    ) -> Iterator[tuple[Source, StagedUpload | None]]:
        """The source of a path and, if the path is remote, the download that contains the files."""
        if not is_remote(path):
            yield self._loader.find(path, task), None
            return
        staged = self._remotes.fetch(path, self._state.stage)
        try:
            yield dataclasses.replace(self._state.staged_source(staged, name), task=task), staged
        finally:
            staged.discard()

    def stage(self, files: Sequence[UploadedFile]) -> StagedUpload:
        """Begins an upload. Pass the finished object to ``upload``, and discard it afterwards.

        Raises:
            StateDirRequiredError: The server has no state directory.
            BudgetExceededError, StorageFullError: The files are too large.
        """
        return self._state.stage(files)

    def check_room(self, num_bytes: int, received: int = 0) -> None:
        """Raises the errors of ``stage`` for files of this size; see ``StateDir.check_room``."""
        self._state.check_room(num_bytes, received)

    def upload(
        self,
        name: str,
        staged: StagedUpload,
        pinned: bool = False,
        replace: bool = False,
        expected_generation: int | None = None,
        task: int | None = None,
        chat_template: OwnTemplate | None = None,
    ) -> AdapterInfo:
        """Registers uploaded files as the method ``load`` does, or ``replace`` if that is set."""
        source = dataclasses.replace(self._state.staged_source(staged, name), task=task)
        with self._changing(name):
            self._table.check_generation(name, expected_generation)
            return self._put(
                NewWeights(
                    name=name,
                    source=source,
                    staged=staged,
                    pinned=pinned,
                    replace=replace,
                    expected_generation=expected_generation,
                    chat_template=chat_template,
                )
            )

    def publish(self, name: str, loaded: LoadedAdapter, staged: StagedUpload) -> AdapterInfo:
        """Registers an adapter that this server made, as a new name or a name's next generation.

        The same content does not make a new generation. A private name (``is_private``) does not
        survive a restart.

        Args:
            name: The name.
            loaded: The adapter.
            staged: Its files, which are read if the adapter was evicted.

        Raises:
            AdapterInUseError: The adapter is being unloaded, or is a component of a fusion.
            BudgetExceededError: The adapter is too large for the server's memory.
            StorageFullError: The files cannot be kept.
        """
        source = self._state.staged_source(staged, name)
        with self._changing(name):
            made = self._installer.publish(name, source, loaded, staged.directory.rename)
            return self._record(made)

    def _put(self, new: NewWeights) -> AdapterInfo:
        return self._record(self._installer.install(new))

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """Makes this the only change of the name for now, and counts it as a load."""
        start = time.monotonic()
        try:
            with self._names.only(name):
                self.check_name(name)
                yield
        except Exception:
            self._metrics.loads.labels("error").inc()
            raise
        self._metrics.loads.labels("ok").inc()
        self._metrics.load_seconds.labels("read").observe(time.monotonic() - start)

    def check_name(self, name: str) -> None:
        """Raises InvalidRequestError if a name is malformed, the base's or an alias's."""
        self._check_free(name)
        if self._table.alias(name) is not None:
            raise InvalidRequestError.of("name", say("NAME_OF_ALIAS", value=name))

    def _record(self, registration: Registration) -> AdapterInfo:
        with self._lock:
            return registration.record()

    def rollback(
        self, name: str, generation: int | None = None, expected_generation: int | None = None
    ) -> AdapterInfo:
        """Makes a kept generation of a name current again, with the number that it had.

        Requests that hold another generation finish on it. The generation that was current is
        kept. A pinned adapter stays pinned.

        Args:
            name: A registered name.
            generation: The generation; None for the highest kept one below the current one.
            expected_generation: See ``replace``.

        Raises:
            AdapterNotFoundError: The name is not registered, or the generation is not kept.
            AdapterGenerationError: The generation is not the expected one.
            AdapterInUseError: The adapter is being unloaded, or is a component of a fusion.
            AdapterChangedError: The generation's files have changed.
            BudgetExceededError, StorageFullError: See ``pin``.
        """
        with self._names.only(name):
            registration = self._table.find(name)
            self._table.check_generation(name, expected_generation)
            self._installer.roll_back(registration, generation)
            return self._record(registration)

    def aliases(self) -> list[Alias]:
        """All aliases, by name."""
        return self._table.aliases()

    def set_alias(self, name: str, targets: Sequence[AdapterRef]) -> Alias:
        """Makes a name stand for generations of adapters, of which each request gets one.

        Requests that already hold a generation of the alias finish on it. A generation that an
        alias names is kept.

        Args:
            name: A new name, or that of an alias.
            targets: The generations, with the weights by which requests are divided among them. A
                target without a generation gets the one that is current now.

        Raises:
            InvalidRequestError: The name is malformed, the base's or an adapter's; there are too
                many aliases; or a target occurs twice.
            AdapterNotFoundError: A target is not registered or is being unloaded, or its generation
                is not kept.
            StorageFullError: The alias cannot be saved.
        """
        self._check_free(name)
        with self._changing_alias(name, *(target.name for target in targets)):
            alias = Alias(name, tuple(map(self._target, targets)))
            self._check_alias(alias)
            self._state.save_alias(alias)
            self._put_alias(alias)
        return alias

    def delete_alias(self, name: str) -> None:
        """Frees the name of an alias.

        Raises:
            AdapterNotFoundError: The name is not an alias's.
            StorageFailedError: The change cannot be saved.
        """
        with self._changing_alias(name):
            if self._table.alias(name) is None:
                raise AdapterNotFoundError(say("NOT_AN_ALIAS", alias=name))
            self._state.remove_alias(name)
            self._take_alias(name)

    def _target(self, ref: AdapterRef) -> AliasTarget:
        _, adapter = self._table.resolve(ref)
        return AliasTarget(
            name=ref.name, uuid=adapter.uuid, generation=adapter.generation, weight=ref.weight
        )

    def _check_free(self, name: str) -> None:
        if why := no_adapter_name(name):
            raise InvalidRequestError.of("name", why)
        if name.lower() in (BASE, self.base.name.lower()):
            raise InvalidRequestError.of("name", say("NAME_OF_BASE", value=name))

    def _check_alias(self, alias: Alias) -> None:
        """Raises the errors of ``set_alias``."""
        known = {each.name for each in self._table.aliases()}
        check_alias(alias, known, is_adapter=self._table.get(alias.name) is not None)
        for target in alias.targets:
            ref = AdapterRef(name=target.name, generation=target.generation)
            # A name that was registered again has other weights under the same numbers.
            if self._table.resolve(ref)[1].uuid != target.uuid:
                raise AdapterNotFoundError(say("REGISTERED_AGAIN", adapters=target.name))

    def _put_alias(self, alias: Alias) -> None:
        self._table.put_alias(alias)
        self._metrics.alias_changed(
            alias.name, [(target.name, target.generation) for target in alias.targets]
        )

    def _take_alias(self, name: str) -> None:
        self._table.remove_alias(name)
        self._metrics.alias_changed(name, ())

    @contextlib.contextmanager
    def _changing_alias(self, name: str, *names: str) -> Iterator[None]:
        """Makes this the only change of an alias and of the names of its old and new targets.

        At the end, it drops generations that only the alias kept.
        """
        with contextlib.ExitStack() as locks:
            locks.enter_context(self._names.only(_ALL_ALIASES))
            alias = self._table.alias(name)
            before = {target.name for target in alias.targets} if alias is not None else set[str]()
            for each in sorted({name, *names, *before}):
                locks.enter_context(self._names.only(each))
            yield
            for each in before:
                self._drop_surplus(self._table.find(each))

    def _drop_surplus(self, registration: Registration) -> None:
        current, kept = registration.current, self._table.still_kept(registration)
        if kept == registration.kept:
            return
        try:
            self._state.save(current, pinned=current.pinned, kept=kept)
        except TurretError as error:
            # The next replacement drops them.
            _log.warning(
                "cannot drop kept generations",
                extra=log.fields(adapter=registration.name, reason=error),
            )
        else:
            self._table.swap(registration, current, kept)

    def get(self, name: str, generation: int | None = None) -> AdapterInfo:
        """A snapshot of one adapter, with its current generation or the given one.

        Raises:
            AdapterNotFoundError: The name is not registered, or the generation is not kept.
        """
        with self._lock:
            registration = self._table.find(name)
            return registration.record(generation_of(registration, generation))

    def list(self) -> list[AdapterInfo]:
        """Snapshots of all adapters, by name."""
        return self._table.records()

    def export(self, name: str, generation: int | None = None) -> AdapterExport:
        """Opens an adapter's files, as they were loaded; close the result.

        Raises:
            AdapterNotFoundError: The name is not registered, or the generation is not kept.
            AdapterChangedError: The files have changed since, or are gone.
        """
        while True:
            registration = self._table.find(name)
            with self._lock:
                adapter = generation_of(registration, generation)
                record = registration.record(adapter)
            try:
                root = self._loader.root_of(adapter.source)
                return AdapterExport(root, adapter.source, record)
            except AdapterCheckpointError as error:
                # The files of an upload are removed with their generation; look again if it has
                # gone.
                with self._lock:
                    is_same = adapter in registration.named
                if is_same and self._table.get(name) is registration:
                    raise lost(name, adapter.source, error) from None

    def reread(self, adapter: Adapter, base: BaseModel) -> Lowered:
        """Lowers a generation from its files, for a base of a dtype other than the served one.

        Raises:
            AdapterChangedError: The files have changed since, or are gone.
        """
        return self._loader.reread(adapter.name, adapter.source, adapter.digest, base)

    def pin(self, name: str) -> AdapterInfo:
        """Keeps an adapter in host memory and registered; reads it first if it is on disk.

        Raises:
            AdapterNotFoundError: The name is not registered.
            AdapterInUseError: The adapter is being unloaded.
            AdapterChangedError: The adapter's files have changed.
            BudgetExceededError: There was no room within ``installer.PIN_TIMEOUT_SECONDS``.
            StorageFullError: The pin cannot be saved.
        """
        with self._names.only(name):
            registration = self._table.find(name)
            self._installer.pin(registration)
            return self._record(registration)

    def unpin(self, name: str) -> AdapterInfo:
        """Lets an adapter be evicted and unloaded again.

        Raises:
            AdapterNotFoundError: The name is not registered.
            StorageFullError: The change cannot be saved.
        """
        with self._names.only(name):
            registration = self._table.find(name)
            self._installer.unpin(registration)
            return self._record(registration)

    def unload(
        self,
        name: str,
        mode: UnloadMode = "DRAIN",
        timeout_seconds: float | None = 30.0,
        expected_generation: int | None = None,
    ) -> None:
        """Removes all generations of an adapter; blocks until no request holds one.

        New requests are rejected at once. ``DRAIN`` lets running ones finish; ``FORCE`` ends them.
        If the timeout passes first (None means no timeout), the adapter is served again. Uploaded
        files are removed; others stay.

        Raises:
            AdapterNotFoundError: The name is not registered.
            AdapterGenerationError: The generation is not the expected one.
            AdapterInUseError: The adapter is pinned, is a component of a fusion or the target of an
                alias, or is still held after the timeout.
            InvalidRequestError: The mode is unknown.
        """
        self._unloads.unload(name, mode, timeout_seconds, expected_generation)

    def _end_users(self, uuid: str) -> None:
        for end in self.on_force_unload:
            end(uuid)

    def _on_retired_gone(self, adapter: Adapter) -> None:
        self._notify_gone(adapter)
        if adapter.source.is_upload:
            # If the process is ending, the files stay; the next start removes them.
            with contextlib.suppress(RuntimeError):
                self._janitor.submit(self._state.discard, adapter.source)

    def _notify_gone(self, adapter: Adapter) -> None:
        self.on_unloaded(adapter.key)

    def find(self, ref: AdapterRef) -> Adapter | None:
        """The generation that a reference names now, without holding it; None if there is none."""
        try:
            return self._table.resolve(ref, suggests=False)[1]
        except AdapterNotFoundError:
            return None

    def acquire(self, refs: Sequence[AdapterRef], tenant: bytes = b"") -> Mix:
        """Resolves a request's adapters, all or none, and counts them in flight.

        The mix must be passed to ``release`` once. Before the operators are used,
        ``Mix.ensure_host`` must have reported that they are resident.

        Raises:
            InvalidRequestError: A name appears twice.
            AdapterNotFoundError: Names or generations are unknown, or names are being unloaded. The
                error lists all of them.
        """
        return self._table.acquire(refs, tenant)

    def wanting(self) -> frozenset[Mix]:
        """See ``Leases.wanting``."""
        return self._leases.wanting()

    def hand_over(self, mixes: Iterable[Mix], to: Mix) -> None:
        """See ``Leases.hand_over``."""
        self._leases.hand_over(mixes, to)

    def release(self, mix: Mix) -> None:
        """Ends a request's use of its adapters. Releasing twice, or ``BASE_MIX``, is harmless."""
        self._table.release(mix)

    def close(self) -> None:
        """Stops background reads; callers that are waiting for one get an UnavailableError."""
        self._leases.shutdown()
        self._janitor.shutdown(wait=True)
        self._state.close()
