"""Adapters in S3 buckets and OCI registries: their files are fetched once and kept like uploads.

s3fs reads ``s3://bucket/folder``, with AWS's variables and credential files. oras reads
``oci://host/repository:tag`` or ``…@sha256:digest``, with Docker's config.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turret.server.adapters.adapter import (
    CONFIG_FILE,
    PROVENANCE_FILE,
    TENSORS_FILE,
    TOKENIZER_FILES,
)
from turret.server.adapters.checkpoint.adapter_root import refuse
from turret.server.adapters.state_dir import StagedUpload, UploadedFile
from turret.server.basics.names import OCI_SCHEME, S3_SCHEME, is_below_remote
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
_CHUNK_BYTES = 1 << 20
# The time for a registry to accept a connection, and the time between the bytes that it sends.
_SOCKET_SECONDS = (10.0, 30.0)
_MAX_MANIFEST_BYTES = 4 << 20
_NAMES = frozenset((CONFIG_FILE, TENSORS_FILE, PROVENANCE_FILE, *TOKENIZER_FILES))
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
# The annotation in which oras puts the name of a layer's file.
_TITLE = "org.opencontainers.image.title"
_LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?/")

Stage = Callable[[Sequence[UploadedFile]], StagedUpload]


@dataclass(frozen=True, slots=True)
class _File:
    announced: UploadedFile
    read: Callable[[], Iterator[bytes]]


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

    def fetch(self, path: str, stage: Stage) -> StagedUpload:
        """Downloads an adapter's files; blocks.

        Args:
            path: The path, with its scheme.
            stage: Makes room for the files.

        Returns:
            The finished upload, which the caller discards.

        Raises:
            AdapterCheckpointError: The path is not allowed, or not an adapter's.
            HubError: The path does not exist, or the server's credentials do not allow access.
            HubUnavailableError: The storage does not answer, is too slow, or sent other bytes than
                it announced.
            BudgetExceededError: The files are too large.
            QueueFullError: ``MAX_DOWNLOADS`` are under way.
            TurretError: An error of ``stage``.
        """
        if not any(is_below_remote(path, prefix) for prefix in self._allowed):
            choices = ", ".join(self._allowed) or "none"
            raise refuse(path, say("REMOTE_NOT_ALLOWED", choices=choices))
        if not self._places.acquire(blocking=False):
            raise QueueFullError(say("TOO_MANY_DOWNLOADS", most=MAX_DOWNLOADS))
        download = _Download(path, self._max_bytes, stage, self._places.release)
        # The libraries may block where no exception can interrupt them, so the download has its own
        # thread. After the timeout the caller gives up, but the download's place stays taken until
        # the thread ends.
        thread = threading.Thread(target=download.run, name="download", daemon=True)
        thread.start()
        while thread.is_alive() and (left := download.ends_at - time.monotonic()) > 0:
            thread.join(left)
        return download.result()


class _Download:
    """One download, on its own thread. After ``ends_at``, it discards what it has received."""

    def __init__(self, path: str, max_bytes: int, stage: Stage, end: Callable[[], None]) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._stage = stage
        self._end = end
        self._lock = threading.Lock()
        self._is_abandoned = False
        self._staged: StagedUpload | None = None
        self._error: BaseException | None = None
        self.ends_at = time.monotonic() + LEAST_SECONDS

    def result(self) -> StagedUpload:
        """The finished upload. If there is none yet, the download is abandoned."""
        with self._lock:
            self._is_abandoned = self._staged is None
            staged, error = self._staged, self._error
        if error is not None:
            raise error
        if staged is None:
            raise HubUnavailableError(say("REMOTE_TOO_SLOW", path=self._path))
        return staged

    def run(self) -> None:
        try:
            self._fetch()
        except TurretError as error:
            self._error = error
        except FileNotFoundError:
            self._error = HubError.of(say("REMOTE_MISSING", path=self._path))
        except PermissionError:
            self._error = HubError.of(say("REMOTE_FORBIDDEN", path=self._path))
        except ImportError as error:
            self._error = HubError.of(say("REMOTE_NEEDS_PACKAGE", package=error.name))
        except Exception as error:
            problem = f"{type(error).__name__}: {error!s:.200}"
            self._error = HubUnavailableError(
                say("REMOTE_NOT_REACHED", path=self._path, problem=problem)
            )
        finally:
            self._end()

    def _fetch(self) -> None:
        is_s3 = self._path.startswith(S3_SCHEME)
        storage = _S3(self._path) if is_s3 else _Oci(self._path, self._check)
        with contextlib.closing(storage):
            files = storage.files()
            for name in (CONFIG_FILE, TENSORS_FILE):
                if name not in files:
                    raise refuse(self._path, say("REMOTE_LACKS_FILE", file=name))
            size = sum(file.announced.size_bytes for file in files.values())
            if size > self._max_bytes:
                most = self._max_bytes
                raise BudgetExceededError(
                    say("UPLOAD_TOO_LARGE", path=self._path, bytes=size, max_upload_bytes=most)
                )
            self.ends_at += size / LEAST_BYTES_PER_SECOND
            staged = self._stage([file.announced for file in files.values()])
            staged.origin = storage.origin
            try:
                self._receive(staged, files.values())
                with self._lock:
                    if not self._is_abandoned:
                        self._staged = staged
            finally:
                if self._staged is None:
                    staged.discard()

    def _check(self) -> None:
        if self._is_abandoned:
            raise TimeoutError

    def _receive(self, staged: StagedUpload, files: Iterable[_File]) -> None:
        try:
            for file in files:
                for data in file.read():
                    staged.write(file.announced.name, data)
                    self._check()
            staged.finish()
        except InvalidRequestError as error:
            text = say("REMOTE_DAMAGED", path=self._path, problem=error.message)
            raise HubUnavailableError(text) from None


class _S3:
    """A folder of a bucket."""

    def __init__(self, path: str) -> None:
        import s3fs

        self._folder = path.removeprefix(S3_SCHEME).rstrip("/")
        self.origin = S3_SCHEME + self._folder
        self._system = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={"connect_timeout": 10, "read_timeout": 30},
        )

    def close(self) -> None:
        """Does nothing: s3fs closes its connections when they are idle."""

    def files(self) -> dict[str, _File]:
        found: dict[str, _File] = {}
        for entry in self._system.ls(self._folder, detail=True):
            name = entry["name"].rpartition("/")[2]
            if entry["type"] == "file" and name in _NAMES:
                read = self._reader(entry["name"])
                found[name] = _File(UploadedFile(name, int(entry["size"])), read)
        return found

    def _reader(self, key: str) -> Callable[[], Iterator[bytes]]:
        def read() -> Iterator[bytes]:
            # s3fs raises an error if the object changes while it is open.
            opened: Any = self._system.open(key, "rb", block_size=8 << 20)
            with opened as file:
                while data := file.read(_CHUNK_BYTES):
                    yield data

        return read


class _Oci:
    """An artifact whose layers are files, as ``oras push`` makes it.

    A registry on this machine is read over HTTP without TLS, as Docker does. After ``files``,
    ``origin`` contains the digest of the manifest.

    Args:
        path: The path, with its scheme.
        check: Called after each received piece. It raises an error to end the download.
    """

    def __init__(self, path: str, check: Callable[[], None]) -> None:
        import oras.provider

        self._check = check

        self._name = path.removeprefix(OCI_SCHEME)
        is_local = _LOCAL_HOST.match(self._name) is not None
        self._registry = oras.provider.Registry(insecure=is_local)
        session = self._registry.session
        # oras sets no timeout.
        timed = functools.partial(session.request, timeout=_SOCKET_SECONDS)
        session.request = timed  # type: ignore[method-assign]
        self._container = self._registry.get_container(self._name)
        self.origin = ""

    def close(self) -> None:
        self._registry.session.close()

    def files(self) -> dict[str, _File]:
        self._registry.auth.load_configs(self._container)
        url = f"{self._registry.prefix}://{self._container.manifest_url()}"
        data = bytearray()
        for piece in self._ask(url, {"Accept": ", ".join(_MANIFESTS)}):
            data += piece
            if len(data) > _MAX_MANIFEST_BYTES:
                raise ValueError("the manifest is too large")
        found_digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if self._container.digest not in (None, found_digest):
            raise ValueError("the manifest does not have the requested digest")
        place = f"{self._container.registry}/{self._container.api_prefix}"
        self.origin = f"{OCI_SCHEME}{place}@{found_digest}"
        found: dict[str, _File] = {}
        for layer in json.loads(data).get("layers", []):
            name = (layer.get("annotations") or {}).get(_TITLE)
            digest = _DIGEST.fullmatch(layer["digest"])
            if name in _NAMES and digest is not None:
                size = int(layer["size"])
                if size < 0:
                    # A negative size would make room for another file in the sum of all sizes.
                    raise ValueError("the size of a file is negative")
                announced = UploadedFile(name, size, digest[1])
                found[name] = _File(announced, self._reader(layer["digest"]))
        return found

    def _reader(self, digest: str) -> Callable[[], Iterator[bytes]]:
        url = f"{self._registry.prefix}://{self._container.get_blob_url(digest)}"
        return lambda: self._ask(url, {})

    def _ask(self, url: str, headers: Mapping[str, str]) -> Iterator[bytes]:
        """The answer in pieces, each as soon as it arrives."""
        with self._registry.do_request(url, headers=dict(headers), stream=True) as answer:
            if answer.status_code == 404:
                raise FileNotFoundError
            if answer.status_code in (401, 403):
                raise PermissionError
            answer.raise_for_status()
            while data := answer.raw.read1(_CHUNK_BYTES, decode_content=True):
                self._check()
                yield data
