"""Downloads an adapter from a bucket or a registry; ``remote.py`` runs it in a child process.

The answers of a registry are untrusted, and the clients of buckets and registries limit neither
their size nor their duration. The process limits both, and the kernel ends it at the limits.

The process writes lines of JSON to standard output. The first line lists the files. Each further
line announces bytes of a file, which follow it, and an empty object is the last line. A line with
the key ``error`` reports why the download failed.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import json
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

_CHUNK_BYTES = 1 << 20
# Time limits for a registry to accept a connection, and for it to send anything.
_SOCKET_SECONDS = (10.0, 30.0)
_MAX_MANIFEST_BYTES = 4 << 20
_MAX_REDIRECTS = 3
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
# The annotation in which oras puts the name of a layer's file.
_TITLE = "org.opencontainers.image.title"
_LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?/")


class File(NamedTuple):
    """A file of the adapter: its size, its SHA-256 (or ""), and its content in pieces."""

    size: int
    sha256: str
    read: Callable[[], Iterator[bytes]]


class S3:
    """A folder of a bucket."""

    def __init__(self, folder: str) -> None:
        import aiohttp
        import s3fs

        # botocore itself handles the redirects of S3. aiohttp would follow any other redirect and
        # send the session's token with it.
        request = functools.partialmethod(aiohttp.ClientSession.request, allow_redirects=False)
        aiohttp.ClientSession.request = request  # type: ignore[method-assign]
        self._folder = folder.rstrip("/")
        self.origin = f"s3://{self._folder}"
        self._system = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={"connect_timeout": 10, "read_timeout": 30},
        )

    def files(self) -> dict[str, File]:
        """All files of the folder, by name."""
        return {
            entry["name"].rpartition("/")[2]: File(
                int(entry["size"]), "", self._reader(entry["name"])
            )
            for entry in self._system.ls(self._folder, detail=True)
            if entry["type"] == "file"
        }

    def _reader(self, key: str) -> Callable[[], Iterator[bytes]]:
        def read() -> Iterator[bytes]:
            # s3fs raises an error if the object changes while it is open.
            opened: Any = self._system.open(key, "rb", block_size=8 << 20)
            with opened as file:
                while data := file.read(_CHUNK_BYTES):
                    yield data

        return read


class Oci:
    """An artifact whose layers are files, as ``oras push`` makes it.

    A registry on this machine is contacted over HTTP, as Docker does. ``origin`` contains the
    digest of the manifest once ``files`` has read it.
    """

    def __init__(self, name: str) -> None:
        import oras.auth
        import oras.provider
        from requests.adapters import HTTPAdapter

        is_local = _LOCAL_HOST.match(name) is not None
        self._registry = oras.provider.Registry(insecure=is_local)
        self._container = self._registry.get_container(name)
        host = urlsplit(f"//{self._container.registry}").hostname or ""

        class Adapter(HTTPAdapter):
            """Checks the address of each request, including redirects and those for tokens."""

            def send(self, request: Any, *args: Any, **options: Any) -> Any:
                if problem := check_address(request.url, host, is_secure=not is_local):
                    # oras would repeat the request after any other error.
                    raise oras.auth.AuthenticationException(problem)
                # oras passes no timeout.
                options["timeout"] = _SOCKET_SECONDS
                return super().send(request, *args, **options)

        self._registry.session.max_redirects = _MAX_REDIRECTS
        for scheme in ("http://", "https://"):
            self._registry.session.mount(scheme, Adapter())
        self.origin = ""

    def files(self) -> dict[str, File]:
        """The files of the layers that have a title, by title."""
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
        self.origin = f"oci://{place}@{found_digest}"
        found: dict[str, File] = {}
        for layer in json.loads(data).get("layers", []):
            name = (layer.get("annotations") or {}).get(_TITLE)
            digest = _DIGEST.fullmatch(layer["digest"])
            if isinstance(name, str) and digest is not None:
                found[name] = File(int(layer["size"]), digest[1], self._reader(layer["digest"]))
        return found

    def _reader(self, digest: str) -> Callable[[], Iterator[bytes]]:
        url = f"{self._registry.prefix}://{self._container.get_blob_url(digest)}"
        return lambda: self._ask(url, {})

    def _ask(self, url: str, headers: Mapping[str, str]) -> Iterator[bytes]:
        """The raw answer in pieces, each as soon as it arrives."""
        headers = {"Accept-Encoding": "identity", **headers}
        with self._registry.do_request(url, headers=headers, stream=True) as answer:
            if answer.status_code == 404:
                raise FileNotFoundError
            if answer.status_code in (401, 403):
                raise PermissionError
            answer.raise_for_status()
            while data := answer.raw.read1(_CHUNK_BYTES, decode_content=False):
                yield data


def check_address(url: str, registry: str, *, is_secure: bool) -> str:
    """The reason why a registry may not redirect the server to an address; empty if it may.

    The server can reach addresses that the owner of a registry cannot, such as a cloud's metadata.

    Args:
        url: The address.
        registry: The host of the registry.
        is_secure: Whether the registry uses TLS.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_secure and parts.scheme != "https":
        return f"the registry refers to {parts.scheme}://{host}, which has no TLS"
    # The owner of a registry could add an internal address to the public ones of its name.
    if host != registry and max(_nearness(host)) > min(_nearness(registry)):
        return f"the registry refers to the internal address {host}"
    return ""


def _nearness(host: str) -> list[int]:
    """How near each address of a host is; see ``_nearness_of``."""
    try:
        # A link-local address may have a zone after a percent sign.
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host.partition("%")[0], None)}
    except OSError:
        # This machine cannot resolve the name, but a proxy may know it.
        return [0]
    return [*map(_nearness_of, found)]


def _nearness_of(text: str) -> int:
    """0 on the internet, 1 in a private network, 2 on this machine, 3 for link-local addresses."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_link_local or address.is_unspecified or address.is_multicast:
        return 3
    if address.is_loopback:
        return 2
    return 0 if address.is_global else 1


def resolve_once() -> None:
    """Make all look-ups of a host in this process return what the first one found.

    Otherwise, a name could have one address when it is checked, and another one for the connection.
    """
    look_up: Any = socket.getaddrinfo
    found: dict[object, list[Any] | OSError] = {}

    def look_up_once(host: Any, port: Any, family: int = 0, *arguments: Any, **named: Any) -> Any:
        if host not in found:
            try:
                found[host] = look_up(host, None)
            except OSError as error:
                found[host] = error
        first = found[host]
        if isinstance(first, OSError):
            raise first
        kinds = {each[4][0]: each[0] for each in first if family in (0, each[0])}
        answers = [
            look_up(address, port, kind, *arguments, **named) for address, kind in kinds.items()
        ]
        return [each for answer in answers for each in answer]

    socket.getaddrinfo = look_up_once


def _write(line: Mapping[str, object]) -> None:
    sys.stdout.buffer.write(json.dumps(line).encode() + b"\n")


def _download(path: str, names: list[str], ends_at: float, bytes_per_second: float) -> None:
    scheme, _, rest = path.partition("://")
    storage = S3(rest) if scheme == "s3" else Oci(rest)
    found = storage.files()
    files = {name: found[name] for name in names if name in found}
    if any(file.size < 0 for file in files.values()):
        # A negative size would allow a larger file in the sum of all sizes.
        raise ValueError("the size of a file is negative")
    _write(
        {
            "origin": storage.origin,
            "files": [[name, file.size, file.sha256] for name, file in files.items()],
        }
    )
    size = sum(file.size for file in files.values())
    seconds = ends_at - time.monotonic() + size / bytes_per_second
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    for name, file in files.items():
        for data in file.read():
            _write({"file": name, "bytes": len(data)})
            sys.stdout.buffer.write(data)
    _write({})


def main(seconds: str, bytes_per_second: str, max_bytes: str, path: str, *names: str) -> None:
    """Download an adapter.

    Args:
        seconds: The time limit for finding out the sizes of the files. At a time limit, a signal
            ends the process.
        bytes_per_second: The files may take as long as their bytes take at this rate.
        max_bytes: The limit of the address space.
        path: The path of the adapter, with its scheme.
        names: The files to download, if they exist.
    """
    # Ctrl-C reaches the whole process group, but the parent decides when its children end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ends_at = time.monotonic() + float(seconds)
    signal.setitimer(signal.ITIMER_REAL, max(float(seconds), 1e-6))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (int(max_bytes), int(max_bytes)))
    resolve_once()
    try:
        _download(path, list(names), ends_at, float(bytes_per_second))
    except FileNotFoundError:
        _write({"error": "REMOTE_MISSING"})
    except PermissionError:
        _write({"error": "REMOTE_FORBIDDEN"})
    except ImportError as error:
        _write({"error": "REMOTE_NEEDS_PACKAGE", "package": error.name})
    except Exception as error:
        problem = f"{type(error).__name__}: {error!s:.200}"
        _write({"error": "REMOTE_NOT_REACHED", "problem": problem})
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
