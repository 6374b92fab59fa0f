"""A real fleet on Ray Serve, started by ``turret cluster serve``."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from checkout import ROOT
from servers.probe import free_port

from turret.clients.client import TurretClient

_START_SECONDS = 240.0
_STOP_SECONDS = 90.0
_WHOLE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class ServingFleet:
    """A running fleet with one gRPC and one HTTP address.

    ``metrics_address`` is the first address of its replicas' metrics.
    """

    address: str
    http_address: str
    metrics_address: str
    state_dir: Path
    process: subprocess.Popen[bytes]
    log: Path

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        return self._called("ray::ServeReplica:turret")

    def tree(self) -> list[psutil.Process]:
        """The command's process and all of its descendants."""
        command = psutil.Process(self.process.pid)
        return [command, *command.children(recursive=True)]

    def registry(self) -> psutil.Process:
        """The process of the registry."""
        (found,) = self._called("ray::RegistryActor")
        return found

    def named(self, name: str) -> list[psutil.Process]:
        """The processes whose names start with ``name``."""
        return [each for each in self.tree() if _name(each).startswith(name)]

    def _called(self, title: str) -> list[psutil.Process]:
        return [each for each in self.tree() if _title(each).startswith(title)]

    def status(self) -> str:
        """The output of ``turret cluster status``."""
        command = [sys.executable, "-m", "turret.server.cli", "cluster", "status"]
        command += ["--state-dir", str(self.state_dir)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def wait_until_whole(self, count: int) -> float:
        """Wait for this number of replicas, each with all adapters; returns the time taken."""
        start = time.monotonic()
        while not _is_whole(self.status(), count):
            assert time.monotonic() < start + _WHOLE_SECONDS, self.status()
            time.sleep(0.2)
        return time.monotonic() - start


def status_rows(status: str) -> list[dict[str, str]]:
    """The replicas in the output of ``turret cluster status``, by heading."""
    lines = [line.replace("┃", "│") for line in status.splitlines()]
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in lines if line[:1] == "│"]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


def _is_whole(status: str, count: int) -> bool:
    rows = status_rows(status)
    revision = status.split()[2].rstrip(",")
    return len(rows) == count and {row["revision"] for row in rows} == {revision}


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """The (host, port) pairs on which a process listens (TCP) or receives (UDP)."""
    try:
        found = process.net_connections(kind="inet")
    except psutil.NoSuchProcess:
        return set()
    # An IPv6 socket bound to an IPv4 address accepts only that address.
    return {
        (each.laddr.ip.removeprefix("::ffff:"), each.laddr.port)
        for each in found
        if each.status == psutil.CONN_LISTEN or (each.type == socket.SOCK_DGRAM and not each.raddr)
    }


def wait_for_text(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a process has written a text to its log."""
    end = time.monotonic() + _START_SECONDS
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.2)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextlib.contextmanager
def start_fleet(folder: Path, *flags: str, host: str = "127.0.0.1") -> Iterator[ServingFleet]:
    """Run ``turret cluster serve`` on the example adapters; SIGTERM ends it.

    Args:
        folder: The directory for its log and its state directory.
        flags: Additional flags.
        host: The host of the fleet; metrics are on 127.0.0.1.

    Raises:
        AssertionError: The fleet did not start, or SIGTERM did not end it with exit code 0.
    """
    log, state_dir = folder / "fleet.log", folder / "state"
    address, http = (f"{host}:{free_port()}" for _ in range(2))
    metrics = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "turret.server.cli", "cluster", "serve"]
    command += ["--address", address, "--http-address", http, "--state-dir", str(state_dir)]
    command += ["--metrics-address", metrics]
    command += ["--adapter-root", str(ROOT / "examples" / "adapters"), *flags]
    # Ray starts its own workers, which must find the same code.
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with log.open("wb") as written:
        # A separate process group, so that the test can signal all of it.
        process = subprocess.Popen(
            command, stdout=written, stderr=written, env=environment, start_new_session=True
        )
    try:
        wait_for_text(log, "serving.serve serving", process)
        yield ServingFleet(address, http, metrics, state_dir, process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            code = process.wait(_STOP_SECONDS)
            assert code == 0, log.read_text()[-4000:]


class Asking:
    """Clients that send short requests one after the other while the block runs.

    Args:
        address: The address of the fleet.
        ask: Sends one request with a client; the number differs from request to request.
        count: The number of clients.
        options: Options of the clients.

    Attributes:
        failures: The errors of requests, and the true values that ``ask`` returned.
        num_answers: The number of finished requests.
        longest: The longest duration of a request.
    """

    def __init__(
        self,
        address: str,
        ask: Callable[[TurretClient, int], object],
        count: int,
        **options: Any,
    ) -> None:
        self._address, self._ask, self._options = address, ask, options
        self._is_over = threading.Event()
        self.failures: list[object] = []
        self.num_answers, self.longest = 0, 0.0
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(count)]

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        with TurretClient(self._address, timeout=120.0, **self._options) as client:
            while not self._is_over.is_set():
                number += 1
                start = time.monotonic()
                try:
                    if wrong := self._ask(client, number):
                        self.failures.append(wrong)
                except Exception as error:
                    self.failures.append(error)
                self.longest = max(self.longest, time.monotonic() - start)
                self.num_answers += 1
