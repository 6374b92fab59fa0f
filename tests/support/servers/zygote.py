"""Starts servers within a second, by forking a process that has imported everything.

``cd tests/support && python -m servers.zygote`` reads a JSON array per line: flags, environment,
working directory, log.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from checkout import ROOT

START_SECONDS = 240.0
_MODULES = (
    "turret.server.app",
    "turret.server.build",
    "turret.server.http.server",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
)
_ADDRESS = re.compile(r"turret\.server\.app (metrics|http|serving) .*?address=(\S+)")


def addresses_of(log: Path, is_alive: Callable[[], bool]) -> dict[str, str]:
    """Wait until a server serves, and return the addresses in its log.

    Raises:
        AssertionError: The server did not start.
    """
    end = time.monotonic() + START_SECONDS
    while True:
        # Check this before reading the log, so that the last output is not missed.
        was_alive = is_alive()
        text = log.read_text(errors="replace") if log.exists() else ""
        found: dict[str, str] = dict(_ADDRESS.findall(text))
        if "serving" in found:
            return found
        assert was_alive, f"the server ended:\n{text[-3000:]}"
        assert time.monotonic() < end, f"the server did not start:\n{text[-3000:]}"
        time.sleep(0.01)


class Life:
    """A running server, with the methods of ``subprocess.Popen``.

    Attributes:
        pid: The id of its process.
        address: The gRPC address.
        metrics_address: The address of the metrics.
        http_address: The address of the HTTP server; empty without its flag.
        log: The file with its output.
    """

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log
        self.process = psutil.Process(pid)
        found = addresses_of(log, lambda: self.is_alive)
        self.address = found["serving"]
        self.metrics_address, self.http_address = found.get("metrics", ""), found.get("http", "")

    @property
    def is_alive(self) -> bool:
        # A zombie counts too: until the system reaps it (see ``main``), its threads hold files.
        return self.process.is_running()

    def send_signal(self, number: int) -> None:
        """Send a signal to the server, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """The exit code once the server has ended."""
        if self.is_alive:
            return None
        code = _exit_code(self.log)
        return int(code.read_text()) if code.exists() else -signal.SIGKILL

    def wait(self, timeout: float = 60.0) -> int:
        """Wait until the server has ended, and return its exit code."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < end, f"it does not end:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.005)
        return code


class Zygote:
    """Starts servers. Use ``running_zygote`` or ``shared_zygote``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._number = 0

    def start(
        self, folder: Path, *flags: str, environment: Mapping[str, str] | None = None
    ) -> Life:
        """Start a server, and wait until it answers."""
        self._number += 1
        log = folder / f"server-{self._number}.log"
        log.unlink(missing_ok=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = [list(flags), dict(environment or {}), os.getcwd(), str(log.absolute())]
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Life(int(self._process.stdout.readline()), log)


@contextmanager
def running_zygote(environment: Mapping[str, str] | None = None) -> Iterator[Zygote]:
    """A zygote whose servers also have these variables. It ends with all its servers."""
    with subprocess.Popen(
        [sys.executable, "-m", "servers.zygote"],
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


@functools.cache
def shared_zygote() -> Zygote:
    """The zygote of this process's tests."""
    running = running_zygote()
    atexit.register(running.__exit__, None, None, None)
    return running.__enter__()


def _exit_code(log: Path) -> Path:
    return log.with_suffix(".code")


def _serve(flags: list[str], environment: dict[str, str], folder: str, log: str) -> int:
    from turret.server import cli

    os.environ.update(environment)
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    sys.stdin.close()
    address = ("--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0")
    return cli.main(["serve", *address, *flags])


def main() -> None:
    # The children use these modules. transformers would import its modules only at their first use.
    for module in _MODULES:
        importlib.import_module(module)
    # Nothing waits for the children, so the system must reap them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                code = _serve(*order)
            finally:
                _exit_code(Path(order[-1])).write_text(str(code))
                os._exit(code)
        print(child, flush=True)


if __name__ == "__main__":
    main()
