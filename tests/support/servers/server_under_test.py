"""A real ``turret serve`` process on free ports, and its metrics."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from servers.zygote import Life, addresses_of, shared_zygote

_STOP_SECONDS = 60.0
# Variables that are read only after libraries and allocators have started.
_READ_WHILE_SERVING = {"XDG_CACHE_HOME"}


@dataclass(frozen=True, slots=True)
class ServerUnderTest:
    """A running server.

    Attributes:
        address: ``HOST:PORT`` of the gRPC service.
        metrics_address: ``HOST:PORT`` of the Prometheus endpoint.
        http_address: ``HOST:PORT`` of the OpenAI-compatible server; empty without its flag.
        adapter_root: The directory for adapters.
        process: The process; ``start_server`` stops it.
        log: The file with its output.
    """

    address: str
    metrics_address: str
    http_address: str
    adapter_root: Path
    process: subprocess.Popen[bytes] | Life
    log: Path

    def metrics(self, token: str = "") -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """One scrape: (series name, its labels) → value."""
        headers = {"authorization": f"Bearer {token}"} if token else {}
        url = f"http://{self.metrics_address}/metrics"
        asked = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            text = answer.read().decode()
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series; KeyError if there is none."""
        return self.metrics()[name, frozenset(labels.items())]


@contextlib.contextmanager
def start_server(
    folder: Path,
    *flags: str,
    environment: Mapping[str, str] | None = None,
    user: int | None = None,
) -> Iterator[ServerUnderTest]:
    """Run ``turret serve`` until the block ends, then stop it with SIGTERM.

    Args:
        folder: The directory for the adapter root and the log.
        flags: Additional flags.
        environment: Variables of the server in addition to this process's.
        user: The numeric user and group of the server; None means this process's.

    Raises:
        AssertionError: The server did not start, or SIGTERM did not end it with exit code 0.
    """
    root = folder / "adapters"
    root.mkdir(exist_ok=True)
    flags = ("--adapter-root", str(root), *flags)
    late = (name in _READ_WHILE_SERVING or name.startswith("OTEL_") for name in environment or ())
    if user is None and all(late):
        life = shared_zygote().start(folder, *flags, environment=environment)
        server = ServerUnderTest(
            life.address, life.metrics_address, life.http_address, root, life, life.log
        )
    else:
        server = _execute(folder, root, flags, {**os.environ, **(environment or {})}, user)
    process = server.process
    try:
        yield server
        process.send_signal(signal.SIGTERM)
        code = process.wait(_STOP_SECONDS)
        assert code == 0, f"exit code {code} after SIGTERM:\n{server.log.read_text()[-4000:]}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _execute(
    folder: Path, root: Path, flags: tuple[str, ...], environment: dict[str, str], user: int | None
) -> ServerUnderTest:
    """Start a server in a fresh process."""
    command = [
        *(sys.executable, "-m", "turret.server.cli", "serve"),
        *("--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", *flags),
    ]
    log = folder / "server.log"
    groups: tuple[int, ...] | None = None if user is None else ()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stderr=output, env=environment, user=user, group=user, extra_groups=groups
        )
    try:
        found = addresses_of(log, lambda: process.poll() is None)
    except BaseException:
        process.kill()
        process.wait()
        raise
    http = found.get("http", "")
    return ServerUnderTest(found["serving"], found["metrics"], http, root, process, log)
