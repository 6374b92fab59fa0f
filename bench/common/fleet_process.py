"""A ``turret cluster serve`` that a benchmark starts, queries and stops."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil

_START_SECONDS = 240.0
_STOP_SECONDS = 90.0


def free_port() -> int:
    """A currently free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class FleetProcess:
    """A fleet on this machine, behind one gRPC and one HTTP address.

    Args:
        folder: The directory for its log and its state directory.
        flags: The flags of ``turret cluster serve``.

    Attributes:
        address: ``HOST:PORT`` of gRPC.
        log: The log of the command and its replicas.
    """

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        self.log, self._state = folder / "fleet.log", folder / "state"
        self.address, http = (f"127.0.0.1:{free_port()}" for _ in range(2))
        command = [sys.executable, "-m", "turret.server.cli", "cluster", "serve"]
        command += ["--address", self.address, "--http-address", http]
        command += ["--state-dir", str(self._state), *flags]
        # Let the workers that Ray starts find the same code.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with self.log.open("wb") as written:
            self.process = subprocess.Popen(
                command, stdout=written, stderr=written, env=environment
            )

    def __enter__(self) -> Self:
        end = time.monotonic() + _START_SECONDS
        while "serving.serve serving" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                raise RuntimeError(self.log.read_text()[-4000:])
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(_STOP_SECONDS)

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas, the oldest first."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        found = [one for one in tree if "ray::ServeReplica:turret" in _title(one)]
        return sorted(found, key=lambda one: one.create_time())

    def routes(self) -> set[str]:
        """The targets of the ingress: HAProxy's server lines."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        places = {
            Path(one.environ()["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent
            for one in tree
            if one.name() == "haproxy"
        }
        files = [file for place in places for file in place.rglob("haproxy.cfg")]
        written = "\n".join(file.read_text() for file in files)
        return set(re.findall(r"^ *server (\S+ \S+)", written, re.MULTILINE))


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
