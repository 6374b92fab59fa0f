"""``s3://`` and ``oci://``: adapters on real third-party servers, fetched with s3fs and oras."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import start_problems
from builders.registries import tiny_base
from fleets.replicas import Fleet
from said import says
from servers.storage import needs_registry, oci_registry, s3_server

from turret.server import errors, remote
from turret.server.adapters.registry import AdapterRegistry
from turret.server.adapters.state_dir import NoStateDir
from turret.server.remote import RemoteAdapters
from turret.server.remote_program import check_address, resolve_once

pytest.importorskip("moto")
oras_provider = pytest.importorskip("oras.provider")
s3fs = pytest.importorskip("s3fs")

FILES = ("adapter_config.json", "adapter_model.safetensors")
# The address at which clouds serve a machine's metadata and credentials.
METADATA = "http://169.254.169.254"
_Make = Callable[..., AdapterRegistry]


@pytest.fixture
def registry(registry_with: _Make) -> _Make:
    """Create a registry that may fetch from some places, and close the previous one."""

    def make(*allowed: str, max_bytes: int = 1 << 20) -> AdapterRegistry:
        return registry_with(remotes=RemoteAdapters(allowed, max_bytes))

    return make


@pytest.fixture(scope="module")
def s3_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture
def bucket(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket ``models``, as the variables of AWS describe it."""
    for name, value in (
        ("AWS_ENDPOINT_URL", s3_address),
        ("AWS_ACCESS_KEY_ID", "k"),
        ("AWS_SECRET_ACCESS_KEY", "s"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    system = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    system.mkdir("models")
    yield system
    system.rm("models", recursive=True)


@pytest.fixture(scope="module")
def oci_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with oci_registry(tmp_path_factory.mktemp("oci")) as address:
        yield address


def refused(
    registry: AdapterRegistry, path: str, kind: type[errors.TurretError], reason: str, **params: Any
) -> None:
    """Check that a load fails for a reason, and leaves nothing."""
    with pytest.raises(kind, check=says(reason, **params)):
        registry.load("x", path)
    assert not {"x"} & {record.name for record in registry.list()}
    assert not list((Path(str(registry._state.path)) / "incoming").iterdir())


def digest_of(root: Path, name: str) -> str:
    local = AdapterRegistry(root, tiny_base(), 1 << 30, 64)
    digest = local.load("a", name).facts.digest
    local.close()
    return digest


def push(address: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Push the files of a folder as ``oras push`` does; returns the manifest's digest."""
    with monkeypatch.context() as here:
        here.chdir(folder)
        client = oras_provider.Registry(insecure=True)
        answer = client.push(f"{address}/{name}", files=[p.name for p in folder.iterdir()])
    return answer.headers["Docker-Content-Digest"]


def test_an_adapter_in_a_bucket_is_kept_like_an_upload(
    bucket: Any, registry: _Make, checkpoints: Path, tmp_path: Path
) -> None:
    (checkpoints / "a" / "chat_template.jinja").write_text("own")
    (checkpoints / "a" / "optimizer.pt").write_bytes(b"not fetched")
    bucket.put(str(checkpoints / "a"), "models/adapters/a", recursive=True)
    made = registry("s3://models/adapters")
    loaded = made.load("a", "s3://models/adapters/a")
    assert loaded.facts.digest == digest_of(checkpoints, "a")
    assert loaded.facts.chat_template
    assert loaded.source == "s3://models/adapters/a"
    assert made.load("a", "s3://models/adapters/a").generation == 1
    (kept,) = (tmp_path / "state" / "files").iterdir()
    assert {path.name for path in kept.iterdir()} == {*FILES, "chat_template.jinja"}
    for name in FILES:
        bucket.put(str(checkpoints / "b" / name), f"models/adapters/a/{name}")
    assert made.replace("a", "s3://models/adapters/a").generation == 2
    # A restart needs no bucket.
    bucket.rm("models/adapters", recursive=True)
    restarted = registry()
    again = restarted.pin("a")
    assert again.facts.digest == digest_of(checkpoints, "b")
    assert again.source == "s3://models/adapters/a"


def test_failures_of_a_bucket_are_reported(
    bucket: Any, registry: _Make, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(str(checkpoints / "a"), "models/a", recursive=True)
    made = registry("s3://models")
    refused(made, "s3://models/b", errors.HubError, "REMOTE_MISSING")
    refused(made, "s3://models-of-others/a", errors.AdapterCheckpointError, "BAD_PATH")
    refused(made, "oci://models/a", errors.AdapterCheckpointError, "BAD_PATH")
    refused(made, "s3://models/../a", errors.AdapterCheckpointError, "BAD_PATH")
    small = registry("s3://models", max_bytes=10)
    refused(
        small, "s3://models/a", errors.BudgetExceededError, "UPLOAD_TOO_LARGE", max_upload_bytes=10
    )
    bucket.rm("models/a/adapter_model.safetensors")
    refused(registry("s3://models"), "s3://models/a", errors.AdapterCheckpointError, "BAD_PATH")
    unkept = AdapterRegistry(
        None, tiny_base(), 1 << 30, 64, remotes=RemoteAdapters(("s3://models",), 1 << 20)
    )
    bucket.put(str(checkpoints / "a" / FILES[1]), f"models/a/{FILES[1]}")
    assert isinstance(unkept._state, NoStateDir)
    with pytest.raises(errors.StateDirRequiredError):
        unkept.load("a", "s3://models/a")
    unkept.close()
    monkeypatch.setattr(remote, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(remote, "LEAST_BYTES_PER_SECOND", 1 << 60)
    refused(registry("s3://models"), "s3://models/a", errors.HubUnavailableError, "REMOTE_TOO_SLOW")


@needs_registry
def test_an_adapter_in_an_oci_registry_is_named_by_tag_or_digest(
    oci_address: str, registry: _Make, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = push(oci_address, "acme/sql:v1", checkpoints / "a", monkeypatch)
    second = push(oci_address, "acme/sql:v1", checkpoints / "b", monkeypatch)
    name = f"oci://{oci_address}/acme/sql"
    made = registry(name)
    tagged, pinned = made.load("tag", f"{name}:v1"), made.load("pinned", f"{name}@{first}")
    assert tagged.facts.digest == digest_of(checkpoints, "b")
    assert pinned.facts.digest == digest_of(checkpoints, "a")
    assert (tagged.source, pinned.source) == (f"{name}@{second}", f"{name}@{first}")
    refused(made, f"{name}:v2", errors.HubError, "REMOTE_MISSING")
    refused(made, f"{name}@sha256:{'0' * 64}", errors.HubError, "REMOTE_MISSING")
    refused(made, f"oci://{oci_address}/acme/sqlite:v1", errors.AdapterCheckpointError, "BAD_PATH")


@needs_registry
def test_wrong_bytes_from_a_registry_are_detected(
    oci_address: str,
    registry: _Make,
    checkpoints: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    digest = push(oci_address, "acme/bad:v1", checkpoints / "a", monkeypatch)
    made = registry(f"oci://{oci_address}")
    blobs = next(tmp_path_factory.getbasetemp().glob("oci*")) / "registry/docker/registry/v2/blobs"
    weights = (checkpoints / "a" / FILES[1]).read_bytes()
    for path in blobs.rglob("data"):
        if path.read_bytes() == weights:
            path.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    kind = errors.HubUnavailableError
    refused(made, f"oci://{oci_address}/acme/bad:v1", kind, "REMOTE_DAMAGED")
    manifest = blobs / "sha256" / digest[7:9] / digest[7:] / "data"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    refused(made, f"oci://{oci_address}/acme/bad@{digest}", kind, "REMOTE_NOT_REACHED")


def test_a_fleet_fetches_once_for_all_replicas(
    bucket: Any, checkpoints: Path, tmp_path: Path
) -> None:
    bucket.put(str(checkpoints / "a"), "models/a", recursive=True)
    fleet = Fleet(tmp_path / "fleet", checkpoints, adapter_remote=("s3://models",))
    first, second = fleet.start(), fleet.start()
    loaded = first.registry.load("a", "s3://models/a")
    bucket.rm("models/a", recursive=True)
    pinned = second.registry.pin("a")
    assert pinned.facts.digest == loaded.facts.digest
    assert pinned.source == loaded.source == "s3://models/a"
    fleet.close()
    shutil.rmtree(tmp_path / "fleet")


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("--adapter-remote gs://b --state-dir s", ("adapters.adapter_remote", "NOT_A_REMOTE")),
        ("--adapter-remote s3:// --state-dir s", ("adapters.adapter_remote", "NOT_A_REMOTE")),
        ("--adapter-remote s3://a/../b --state-dir s", ("adapters.adapter_remote", "NOT_A_REMOTE")),
        ("--adapter-remote s3://a", ("adapters.adapter_remote", "NEEDS_FIELD")),
        ("--preload a=s3://b/c", ("adapters.preload.a", "NEEDS_FIELD")),
        (
            "--adapter-remote s3://b/d --state-dir s --preload a=s3://b/c",
            ("adapters.preload.a", "NEEDS_FIELD"),
        ),
    ],
)
def test_invalid_remote_settings_are_reported(flags: str, found: tuple[str, str]) -> None:
    assert found in start_problems.refused(*flags.split())


def test_a_prefix_matches_only_whole_names() -> None:
    for path, prefix in (
        ("oci://host/a/b:v1", "oci://host/a"),
        ("oci://host/a:v1", "oci://host/a"),
        ("oci://host/a@sha256:0", "oci://host/a"),
        ("oci://host/a", "oci://host/"),
        ("s3://a/b", "s3://a/"),
    ):
        assert remote.is_below_remote(path, prefix), (path, prefix)
    for path, prefix in (
        ("oci://host:1/a", "oci://host"),
        ("oci://host.evil/a", "oci://host"),
        ("oci://host/ab", "oci://host/a"),
        ("s3://a:b", "s3://a"),
        ("s3://ab/c", "s3://a"),
    ):
        assert not remote.is_below_remote(path, prefix), (path, prefix)


class _Registry(http.server.BaseHTTPRequestHandler):
    """A hostile registry, whose behaviour depends on the name of the repository."""

    protocol_version = "HTTP/1.1"
    is_over = threading.Event()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        kind = self.path.split("/")[2]
        if kind == "redirect":
            return self._refer(307, "location", f"{METADATA}/latest")
        if kind == "realm":
            return self._refer(401, "www-authenticate", f'Bearer realm="{METADATA}/token"')
        if kind == "endless":
            token = f"http://{self.headers['host']}/v2/token"
            return self._refer(401, "www-authenticate", f'Bearer realm="{token}"')
        if kind.startswith("token"):
            return self._repeat(bytes(1 << 20))
        if kind == "header":
            return self._repeat(b"X", 0.05)
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        if "/slow/" in self.path:
            while not self.is_over.wait(0.05):
                self._send(b" ")
            return
        sizes = (-(1 << 40), 1 << 40) if "/negative/" in self.path else (4, 4)
        layers = [
            {
                "digest": f"sha256:{'0' * 64}",
                "size": size,
                "annotations": {"org.opencontainers.image.title": name},
            }
            for name, size in zip(FILES, sizes, strict=True)
        ]
        manifest = json.dumps({"layers": layers}).encode()
        for piece in (manifest[:9], manifest[9:]) if "manifests" in self.path else (b"ab", b"cd"):
            self._send(piece)
        self.wfile.write(b"0\r\n\r\n")

    def _refer(self, status: int, header: str, value: str) -> None:
        self.send_response(status)
        self.send_header(header, value)
        self.send_header("content-length", "0")
        self.end_headers()

    def _repeat(self, data: bytes, seconds: float = 0.0) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" if seconds else b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(OSError):
            while not self.is_over.wait(seconds):
                self.wfile.write(data)

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()


@pytest.fixture
def hostile() -> Iterator[str]:
    _Registry.is_over.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Registry)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"oci://127.0.0.1:{server.server_port}"
    _Registry.is_over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_slow_registry_does_not_use_up_the_download_slots(
    registry: _Make, hostile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LEAST_SECONDS", 0.5)
    served = registry(hostile)
    for kind in ("slow", *["header"] * remote.MAX_DOWNLOADS, "slow"):
        refused(served, f"{hostile}/{kind}/x:v1", errors.HubUnavailableError, "REMOTE_TOO_SLOW")


def test_an_endless_answer_does_not_fill_the_memory(
    registry: _Make, hostile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LEAST_SECONDS", 3.0)
    served, process = registry(hostile), psutil.Process()
    before = process.memory_info().rss
    # The registry asks for a token, and the answer with the token never ends.
    refused(served, f"{hostile}/endless/x:v1", errors.HubUnavailableError, "REMOTE_TOO_SLOW")
    assert process.memory_info().rss - before < 32 << 20


@pytest.mark.parametrize("kind", ["redirect", "realm"])
def test_a_registry_cannot_redirect_to_an_internal_address(
    registry: _Make, hostile: str, kind: str
) -> None:
    problem = "AuthenticationException: the registry refers to the internal address 169.254.169.254"
    path = f"{hostile}/{kind}/x:v1"
    refused(
        registry(hostile), path, errors.HubUnavailableError, "REMOTE_NOT_REACHED", problem=problem
    )


@pytest.mark.parametrize(
    ("url", "registry", "is_secure", "is_allowed"),
    [
        ("https://1.1.1.1/a", "8.8.8.8", True, True),
        ("https://8.8.8.8/a", "8.8.8.8", True, True),
        ("http://8.8.8.8/a", "8.8.8.8", True, False),
        ("https://10.0.0.1/a", "8.8.8.8", True, False),
        ("https://10.0.0.1/a", "10.0.0.2", True, True),
        ("https://127.0.0.1/a", "10.0.0.2", True, False),
        ("https://[::1]/a", "10.0.0.2", True, False),
        ("https://[::ffff:127.0.0.1]/a", "10.0.0.2", True, False),
        ("https://0.0.0.0/a", "10.0.0.2", True, False),
        ("http://127.0.0.1:1/a", "127.0.0.1", False, True),
        ("http://10.0.0.1/a", "127.0.0.1", False, True),
        ("http://169.254.169.254/a", "127.0.0.1", False, False),
        ("http://[fe80::1%25lo]/a", "127.0.0.1", False, False),
        ("https://169.254.1.1/a", "169.254.1.1", True, True),
    ],
)
def test_addresses_that_a_registry_may_redirect_to(
    url: str, registry: str, *, is_secure: bool, is_allowed: bool
) -> None:
    assert (check_address(url, registry, is_secure=is_secure) == "") == is_allowed


@pytest.mark.parametrize("first", ["1.1.1.1", None])
def test_a_host_name_keeps_the_address_that_was_checked(
    monkeypatch: pytest.MonkeyPatch, first: str | None
) -> None:
    """A name server of the registry's owner returns another address at the second query."""
    look_up: Any = socket.getaddrinfo
    answers = iter([first, "169.254.169.254"])

    def rebound(host: str, *arguments: Any) -> Any:
        found = next(answers) if host.endswith(".example") else host
        if found is None:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return look_up(found, *arguments)

    monkeypatch.setattr(socket, "getaddrinfo", rebound)
    resolve_once()
    assert check_address("https://cdn.example/a", "8.8.8.8", is_secure=True) == ""
    try:
        found = socket.getaddrinfo("cdn.example", 443, 0, socket.SOCK_STREAM)
    except socket.gaierror:
        found = []
    assert [each[4] for each in found] == ([(first, 443)] if first else [])


def test_an_internal_registry_gives_no_access_to_other_internal_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look_up: Any = socket.getaddrinfo

    def several(host: str, *arguments: Any) -> Any:
        hosts = ("8.8.8.8", "169.254.169.254") if host == "registry.example" else (host,)
        return [each for one in hosts for each in look_up(one, *arguments)]

    monkeypatch.setattr(socket, "getaddrinfo", several)
    assert check_address("https://10.0.0.1/a", "registry.example", is_secure=True) != ""
    assert check_address("https://1.1.1.1/a", "registry.example", is_secure=True) == ""


def test_layers_and_sizes_of_a_manifest(registry: _Make, hostile: str) -> None:
    served = registry(hostile)
    # The manifest is read although it arrives in pieces; the files do not match its digests.
    refused(served, f"{hostile}/pieces/x:v1", errors.HubUnavailableError, "REMOTE_DAMAGED")
    refused(served, f"{hostile}/negative/x:v1", errors.HubUnavailableError, "REMOTE_NOT_REACHED")
