"""Adapters in S3 buckets and OCI registries, whose files are fetched once and then kept as uploads.

``s3://bucket/folder`` is read by s3fs, and ``oci://host/repository:tag`` or ``…@sha256:digest`` by
oras, so their settings and credentials apply: AWS's variables and files, and Docker's config.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from turret.server.adapters.adapter import (
    CONFIG_FILE,
    PROVENANCE_FILE,
    TENSORS_FILE,
    TOKENIZER_FILES,
)
from turret.server.adapters.checkpoint.adapter_root import refuse
from turret.server.adapters.state_dir import StagedUpload, UploadedFile
from turret.server.basics.names import is_below_remote
from turret.server.errors import (
    BudgetExceededError,
    HubError,
    HubUnavailableError,
    InvalidRequestError,
    QueueFullError,
    TurretError,
)
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


class RemoteAdapters:
    """Fetches adapters whose paths have a scheme. Safe to use from several threads.

    Args:
        allowed: The prefixes below which adapters may be fetched.
        max_bytes: Maximum size of one adapter's files.
    """

    def __init__(self, allowed: Sequence[str] = (), max_bytes: int = 0) -> None:
        self._allowed = tuple(allowed)
        self._max_bytes = max_bytes
        self._places = threading.BoundedSemaphore(MAX_DOWNLOADS)

    def fetch(self, path: str, stage: StageFiles) -> StagedUpload:
        """Downloads an adapter's files; blocks.

        Args:
            path: The path, with its scheme.
            stage: Makes room for the files.

        Returns:
            The finished upload, which the caller discards.

        Raises:
            AdapterCheckpointError: The path is not allowed, or not an adapter's.
            HubError: The path does not exist, or the server's credentials give no access.
            HubUnavailableError: The storage does not answer, is too slow, or sent other data than
                it announced.
            BudgetExceededError: The files are too large.
            QueueFullError: ``MAX_DOWNLOADS`` are under way.
            TurretError: An error of ``stage``.
        """
        if not self._allowed:
            raise refuse(path, say("REMOTE_UNSUPPORTED"))
        if not any(is_below_remote(path, prefix) for prefix in self._allowed):
            raise refuse(path, say("REMOTE_NOT_ALLOWED", choices=", ".join(self._allowed)))
        if not self._places.acquire(blocking=False):
            raise QueueFullError(say("TOO_MANY_DOWNLOADS", most=MAX_DOWNLOADS))
        try:
            return self._download(path, stage)
        finally:
            self._places.release()

    def _download(self, path: str, stage: StageFiles) -> StagedUpload:
        """Downloads in a child process, which has limits of time and memory."""
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
        size = sum(file.size_bytes for file in files)
        if size > self._max_bytes:
            most, path = self._max_bytes, output.path
            raise BudgetExceededError(
                say("UPLOAD_TOO_LARGE", path=path, bytes=size, max_upload_bytes=most)
            )
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
