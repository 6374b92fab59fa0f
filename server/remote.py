"""Adapters from elsewhere: a Hugging Face hub, S3 buckets and OCI registries."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from turret.server.adapters.adapter import (
    CONFIG_FILE,
    PROVENANCE_FILE,
    TEMPLATE_FILES,
    TENSORS_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
)
from turret.server.adapters.checkpoint.adapter_root import refuse, refuse_missing_tensors
from turret.server.adapters.state_dir import StagedUpload, UploadedFile
from turret.server.basics.files import reporting_disk_faults
from turret.server.basics.names import HUB_SCHEME, HubId, is_below_remote, not_a_hub_id
from turret.server.errors import (
    AdapterCheckpointError,
    BudgetExceededError,
    HubError,
    HubUnavailableError,
    InvalidRequestError,
    QueueFullError,
    TurretError,
)
from turret.server.hub import Repository, cache_dir, download, find_repository
from turret.server.words import say

# The maximum number of concurrent downloads. Each may use the whole disk budget.
MAX_DOWNLOADS = 8
# The timeout of a download is a fixed time plus the time that its bytes take at this low speed.
LEAST_SECONDS = 60.0
LEAST_BYTES_PER_SECOND = 1 << 20
# Limit of the address space of a download.
_MAX_PROCESS_BYTES = 1 << 30
_PROGRAM = Path(__file__).with_name("remote_program.py")
_NAMES = (CONFIG_FILE, TENSORS_FILE, PROVENANCE_FILE, *TOKENIZER_FILES)

StageFiles = Callable[[Sequence[UploadedFile]], StagedUpload]


class _Downloads:
    """Fetches adapters from elsewhere, within limits. Safe to use from several threads.

    Args:
        allowed: Where adapters may be fetched from; nowhere if empty.
        max_bytes: Maximum size of one adapter's files, in bytes.
    """

    def __init__(self, allowed: Sequence[str] = (), max_bytes: int = 0) -> None:
        self._allowed = tuple(allowed)
        self._max_bytes = max_bytes
        self._places = threading.BoundedSemaphore(MAX_DOWNLOADS)

    def _take_place(self) -> None:
        if not self._places.acquire(blocking=False):
            raise QueueFullError(say("TOO_MANY_DOWNLOADS", most=MAX_DOWNLOADS))

    def _check_size(self, path: str, size: int) -> None:
        if size > self._max_bytes:
            most = self._max_bytes
            raise BudgetExceededError(
                say("UPLOAD_TOO_LARGE", path=path, bytes=size, max_upload_bytes=most)
            )


# Adapters in S3 buckets and OCI registries, whose files are fetched once and then kept as uploads.
#
# ``s3://bucket/folder`` is read by s3fs, and ``oci://host/repository:tag`` or ``…@sha256:digest``
# by oras, so their settings and credentials apply: AWS's variables and files, and Docker's config.


class RemoteAdapters(_Downloads):
    """Fetches adapters whose paths have a scheme, below the prefixes that are allowed."""

    def fetch(self, path: str, stage: StageFiles) -> StagedUpload:
        """Download an adapter's files; blocks.

        Args:
            path: The path, with its scheme.
            stage: Makes room for the files.

        Returns:
            The finished upload, which the caller must discard in the end.

        Raises:
            AdapterCheckpointError: The path is not allowed, or not an adapter's.
            HubError: The path does not exist, or the server's credentials give no access.
            HubUnavailableError: The storage does not answer, is too slow, or its data differs
                from what it announced.
            BudgetExceededError: The files are too large.
            QueueFullError: ``MAX_DOWNLOADS`` are under way.
            TurretError: An error of ``stage``.
        """
        if not self._allowed:
            raise refuse(path, say("REMOTE_UNSUPPORTED"))
        if not any(is_below_remote(path, prefix) for prefix in self._allowed):
            raise refuse(path, say("REMOTE_NOT_ALLOWED", choices=", ".join(self._allowed)))
        self._take_place()
        try:
            return self._download(path, stage)
        finally:
            self._places.release()

    def _download(self, path: str, stage: StageFiles) -> StagedUpload:
        """Download in a child process, which has limits of time and memory."""
        limits = map(str, (LEAST_SECONDS, LEAST_BYTES_PER_SECOND, _MAX_PROCESS_BYTES))
        with subprocess.Popen(
            # With -P, no module is imported from the program's own directory.
            [sys.executable, "-P", _PROGRAM, *limits, path, *_NAMES],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                assert process.stdout is not None
                return self._receive(_DownloadOutput(path, process), stage)
            finally:
                process.kill()

    def _receive(self, output: _DownloadOutput, stage: StageFiles) -> StagedUpload:
        listed = output.line()
        files = [UploadedFile(*file) for file in listed["files"]]
        for name in (CONFIG_FILE, TENSORS_FILE):
            if name not in {file.name for file in files}:
                raise refuse(output.path, say("REMOTE_LACKS_FILE", file=name))
        self._check_size(output.path, sum(file.size_bytes for file in files))
        staged = stage(files)
        try:
            staged.origin = listed["origin"]
            while piece := output.line():
                staged.write(piece["file"], output.read(piece["bytes"]))
            staged.finish()
        except InvalidRequestError as error:
            staged.discard()
            text = say("REMOTE_DAMAGED", path=output.path, problem=error.message)
            raise HubUnavailableError(text) from None
        except BaseException:
            staged.discard()
            raise
        return staged


class _DownloadOutput:
    """The output of a download; see ``remote_program.py``."""

    def __init__(self, path: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self.path = path
        self._process = process
        self._file: IO[bytes] = process.stdout

    def line(self) -> dict[str, Any]:
        """The next line.

        Raises:
            HubError, HubUnavailableError: The download failed.
        """
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise self._end()
        found = json.loads(line)
        if "error" in found:
            raise self._error(**found)
        return found

    def read(self, count: int) -> bytes:
        """The bytes that a line announces.

        Raises:
            HubUnavailableError: The download failed.
        """
        data = self._file.read(count)
        if len(data) < count:
            raise self._end()
        return data

    def _error(self, error: str, package: str = "", problem: str = "") -> TurretError:
        if error == "REMOTE_MISSING":
            return HubError.of(say("REMOTE_MISSING", path=self.path))
        if error == "REMOTE_FORBIDDEN":
            return HubError.of(say("REMOTE_FORBIDDEN", path=self.path))
        if error == "REMOTE_NEEDS_PACKAGE":
            return HubError.of(say("REMOTE_NEEDS_PACKAGE", package=package))
        return HubUnavailableError(say("REMOTE_NOT_REACHED", path=self.path, problem=problem))

    def _end(self) -> TurretError:
        """The error for a process that ended by itself."""
        code = self._process.wait()
        if code == -signal.SIGALRM:
            return HubUnavailableError(say("REMOTE_TOO_SLOW", path=self.path))
        return self._error("REMOTE_NOT_REACHED", problem=f"exit code {code}")


# Adapters on the hub: which of them may be loaded, and their files in the cache.


# Value of --adapter-hub that allows every organisation.
ANY = "*"
_NEEDED = (CONFIG_FILE, TENSORS_FILE)


class _Stopped(Exception):
    """Raised to end a download from within."""


class AdapterHub(_Downloads):
    """Resolves paths that begin with ``hub:``. Safe to use from several threads.

    Args:
        allowed: Organisations and users whose adapters may be loaded; ``*`` allows all. If empty,
            none are allowed.
        max_bytes: Maximum size of one adapter's files, in bytes.
    """

    @property
    def root(self) -> Path | None:
        """The folder below which adapters are cached; None if none from the hub is allowed."""
        return cache_dir() if self._allowed else None

    def fetch(self, path: str) -> str:
        """Make sure that an adapter's files are in the cache.

        For a commit whose files are in the cache, the hub is not contacted. Blocks until the
        download ends or reaches its time limit.

        Args:
            path: ``hub:org/name`` or ``hub:org/name@revision``.

        Returns:
            The same path with the commit as its revision.

        Raises:
            AdapterCheckpointError: The path has another form, the organisation is not allowed, or
                the repository contains no adapter.
            HubError: The repository or revision does not exist, or this machine's token gives no
                access.
            HubUnavailableError: The hub does not answer, or too slowly.
            BudgetExceededError: The adapter is too large.
            StorageFullError, StorageFailedError: The cache cannot be written.
            QueueFullError: ``MAX_DOWNLOADS`` are under way.
        """
        repository = self.check(path)
        if repository is None:
            return path
        names = _names(path, repository.files)
        if not _is_there(repository.id, names):
            size = sum(repository.files[name] for name in names)
            self._download(path, repository, names, size)
        return f"{HUB_SCHEME}{repository.id}"

    def check(self, path: str) -> Repository | None:
        """Raise the errors of ``fetch``, before any weights are downloaded.

        Args:
            path: See ``fetch``.

        Returns:
            The repository; None for a commit whose files are in the cache, for which the hub is not
            contacted.

        Raises:
            See ``fetch``.
        """
        hub_id = self._checked(path)
        if hub_id.is_commit and _is_there(hub_id):
            return None
        # A branch may have moved since it was cached.
        repository = find_repository(hub_id, may_be_old=False)
        names = _names(path, repository.files)
        if not _is_there(repository.id, names):
            self._check_size(path, sum(repository.files[name] for name in names))
        return repository

    def find(self, path: str, repository: Repository | None) -> str | None:
        """The folder of an adapter's files, relative to ``root``; None if they are not cached.

        This does not contact the hub.

        Args:
            path: A path that ``check`` accepted.
            repository: The result of ``check``.
        """
        hub_id = self._checked(path) if repository is None else repository.id
        return hub_id.snapshot if hub_id.is_commit and _is_there(hub_id) else None

    def fetch_tokenizer(self, path: str) -> None:
        """Make sure that an adapter's tokenizer, if it has one, is in the cache.

        Args:
            path: The result of ``fetch``.

        Raises:
            See ``fetch``.
        """
        hub_id = self._checked(path)
        if (cache_dir() / hub_id.snapshot / TOKENIZER_FILE).is_file():
            return
        repository = find_repository(hub_id, may_be_old=True)
        if TOKENIZER_FILE not in repository.files:
            return
        # Fetch the largest file last. If it is in the cache, all of them are.
        names = [name for name in TOKENIZER_FILES if name in repository.files][::-1]
        size = sum(repository.files[name] for name in names)
        self._check_size(path, size)
        self._download(path, repository, names, size)

    def _checked(self, path: str) -> HubId:
        if not self._allowed:
            raise refuse(path, say("HUB_NOT_ALLOWED"))
        name = path.removeprefix(HUB_SCHEME)
        hub_id = HubId.find(name)
        if hub_id is None:
            why = not_a_hub_id(name)
            raise AdapterCheckpointError(why, violations=[("path", why)])
        if not {ANY, hub_id.org} & set(self._allowed):
            choices = ", ".join(sorted(self._allowed))
            raise refuse(
                path,
                say("HUB_ORGANISATION_NOT_ALLOWED", organisation=hub_id.org, choices=choices),
            )
        return hub_id

    def _download(self, path: str, repository: Repository, names: Sequence[str], size: int) -> None:
        self._take_place()
        seconds = LEAST_SECONDS + size / LEAST_BYTES_PER_SECOND
        ends_at = time.monotonic() + seconds
        left, failures = size, []

        def on_bytes(count: int) -> None:
            nonlocal left
            left -= count
            if left < 0 or time.monotonic() > ends_at:
                raise _Stopped

        def work() -> None:
            try:
                with reporting_disk_faults():
                    download(repository, names, on_bytes)
            except BaseException as error:
                failures.append(error)
            finally:
                self._places.release()

        # The library may hang in a way that no exception can stop, so it runs on a separate thread.
        # The caller can then give up, while the place stays taken until the library returns.
        thread = threading.Thread(target=work, name=f"download {repository.id}", daemon=True)
        thread.start()
        thread.join(seconds)
        if left < 0:
            raise HubUnavailableError(say("HUB_SENT_TOO_MUCH", path=path))
        if thread.is_alive() or (failures and isinstance(failures[0], _Stopped)):
            name = repository.id.repository
            found = size - left
            raise HubUnavailableError(
                say("HUB_TOO_SLOW", path=path, found=found, needed=size, seconds=seconds, name=name)
            )
        if failures:
            raise failures[0]


def _is_there(hub_id: HubId, names: Sequence[str] = _NEEDED) -> bool:
    folder = cache_dir() / hub_id.snapshot
    return all((folder / name).is_file() for name in names)


def _names(path: str, files: Mapping[str, int]) -> list[str]:
    """The files to fetch.

    Raises:
        AdapterCheckpointError: The config or the tensors of an adapter are missing.
    """
    below = sorted(name for name in files if name.endswith(f"/{CONFIG_FILE}"))
    if CONFIG_FILE not in files and below:
        raise refuse(path, say("ADAPTER_BELOW_TOP", folder=below[0].rpartition("/")[0]))
    if CONFIG_FILE not in files:
        raise refuse(path, say("NOT_AN_ADAPTER"))
    if TENSORS_FILE not in files:
        refuse_missing_tensors(path, sorted(name for name in files if "/" not in name))
    # Fetch the tensors last. If they are in the cache, the other files are, too.
    return [name for name in (PROVENANCE_FILE, *TEMPLATE_FILES, *_NEEDED) if name in files]
