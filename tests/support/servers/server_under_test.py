"""A real ``turret serve`` process on free ports, and its metrics."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

_START_SECONDS = 240.0
_STOP_SECONDS = 60.0
_ADDRESS = re.compile(r"turret\.server\.app (metrics|http|serving) .*?address=(\S+)")


@dataclass(frozen=True, slots=True)
class ServerUnderTest:
    """A server that answers.

    Attributes:
        address: ``HOST:PORT`` of the gRPC service.
        metrics_address: ``HOST:PORT`` of the Prometheus endpoint.
        http_address: ``HOST:PORT`` of the OpenAI-compatible server; empty without its flag.
        adapter_root: Directory that adapters are loaded from.
        process: The process; ``start_server`` stops it.
        log: File with everything it wrote.
    """

    address: str
    metrics_address: str
    http_address: str
    adapter_root: Path
    process: subprocess.Popen[bytes]
    log: Path

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """One scrape: (series name, its labels) → value."""
        url = f"http://{self.metrics_address}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
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
        folder: For the adapter root and the log.
        flags: Further flags.
        environment: Variables of the server in addition to this process's.
        user: Number of the user, and group, that it runs as; None is this process's.

    Raises:
        AssertionError: It did not start, or SIGTERM did not end it with exit code 0.
    """
    root = folder / "adapters"
    root.mkdir(exist_ok=True)
    log = folder / "server.log"
    command = [
        *(sys.executable, "-m", "turret.server.cli", "serve"),
        *("--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0"),
        *("--adapter-root", str(root), *flags),
    ]
    variables = {**os.environ, **(environment or {})}
    groups: tuple[int, ...] | None = None if user is None else ()
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        env=variables,
        user=user,
        group=user,
        extra_groups=groups,
    )
    addresses: dict[str, str] = {}
    is_up = threading.Event()
    reader = threading.Thread(target=_follow, args=(process, log, addresses, is_up), daemon=True)
    reader.start()
    try:
        is_up.wait(_START_SECONDS)
        assert "serving" in addresses, f"the server did not start:\n{log.read_text()}"
        http = addresses.get("http", "")
        yield ServerUnderTest(addresses["serving"], addresses["metrics"], http, root, process, log)
        process.send_signal(signal.SIGTERM)
        code = process.wait(_STOP_SECONDS)
        assert code == 0, f"exit code {code} after SIGTERM:\n{log.read_text()[-4000:]}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join()


def _follow(
    process: subprocess.Popen[bytes], log: Path, addresses: dict[str, str], is_up: threading.Event
) -> None:
    """Copy the process's log to a file and pick the addresses out of it."""
    assert process.stderr is not None
    with process.stderr, log.open("w") as copy:
        for raw in process.stderr:
            line = raw.decode(errors="replace")
            copy.write(line)
            copy.flush()
            if match := _ADDRESS.search(line):
                addresses[match[1]] = match[2]
                if match[1] == "serving":
                    is_up.set()
    is_up.set()
