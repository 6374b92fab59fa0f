"""Starts servers within a second, by forking a process that has imported everything.

cd tests/support && python -m chaos.zygote      reads a JSON object with flags and log a line
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from checkout import ROOT
from servers.server_under_test import _ADDRESS

START_SECONDS = 120.0


class Life:
    """A running server.

    Attributes:
        pid: The id of its process.
        address: The gRPC address.
        metrics_address: The address of the metrics.
        log: The file with its output.
    """

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log
        self.process = psutil.Process(pid)
        found: dict[str, str] = {}
        end = time.monotonic() + START_SECONDS
        while "serving" not in found:
            text = log.read_text(errors="replace") if log.exists() else ""
            found = dict(_ADDRESS.findall(text))
            assert self.is_alive, f"the server ended:\n{text[-3000:]}"
            assert time.monotonic() < end, f"the server did not start:\n{text[-3000:]}"
            time.sleep(0.01)
        self.address, self.metrics_address = found["serving"], found.get("metrics", "")

    @property
    def is_alive(self) -> bool:
        try:
            return self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 60.0) -> None:
        """Wait until the server has ended, for whatever reason."""
        end = time.monotonic() + seconds
        while self.is_alive:
            assert time.monotonic() < end, f"it does not end:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.005)


class Zygote:
    """Starts servers. Use ``running_zygote``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._number = 0

    def start(self, folder: Path, *flags: str) -> Life:
        """Start a server, and wait until it answers."""
        self._number += 1
        log = folder / f"server-{self._number}.log"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([list(flags), str(log)]) + "\n")
        self._process.stdin.flush()
        return Life(int(self._process.stdout.readline()), log)


@contextmanager
def running_zygote(environment: Mapping[str, str] | None = None) -> Iterator[Zygote]:
    """A zygote whose servers also have these variables. It ends with all its servers."""
    with subprocess.Popen(
        [sys.executable, "-m", "chaos.zygote"],
        cwd=ROOT / "tests" / "support",
        env={**os.environ, **(environment or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Zygote(process)
        finally:
            for child in psutil.Process(process.pid).children():
                child.kill()
            assert process.stdin is not None
            process.stdin.close()


def _serve(flags: Sequence[str], log: str) -> int:
    from turret.server import cli

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    sys.stdin.close()
    address = ("--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0")
    return cli.main(["serve", *address, *flags])


def main() -> None:
    from turret.server import app, build
    from turret.server.http import server

    # These modules only need to be imported here; the children use them.
    kept: list[Any] = [app, build, server]
    assert kept
    # Nobody waits for the children, so the system must reap them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        flags, log = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                code = _serve(flags, log)
            finally:
                os._exit(code)
        print(child, flush=True)


if __name__ == "__main__":
    main()
