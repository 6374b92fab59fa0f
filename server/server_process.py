"""A ``turret serve`` process that another process starts, watches and stops."""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Self

_METRICS = re.compile(rb"turret\.server\.app metrics address=(\S+)")
_HTTP = re.compile(rb"turret\.server\.app http address=(\S+)")
_SERVING = re.compile(rb"turret\.server\.app serving .*address=(\S+)")
_TAIL_LINES = 20
_READ_BYTES = 4096
# A program that replaces itself with a command that the kernel ends when the parent process dies.
# Its arguments are the parent's process id and the command. A function between fork and exec could
# do the same, but may hang if the parent has other threads.
_TIED_TO_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerProcessError(Exception):
    """The server did not start, or ended.

    The message ends with the last lines of its log, unless they were shown before.
    """


class ServerProcess:
    """Runs ``turret serve`` on free ports of the loopback interface.

    The server's output is read continuously, because a full pipe would block the server. With
    ``echo``, the output, including progress bars, is repeated on standard error until the server is
    ready. On Linux, the server also ends if this process is killed, or if the thread that created
    this object ends.

    Args:
        flags: Flags of ``turret serve``, which may include ``--address`` and ``--metrics-address``.
        environment: Variables set for the server in addition to this process's.
        echo: Whether to repeat the server's output until it is ready.

    Attributes:
        process: The child. It has its own session, so that Ctrl-C in the terminal only reaches the
            parent, which then stops the child in an orderly way.
        address: ``HOST:PORT`` of the gRPC server; empty until ``wait`` returns.
        metrics_address: ``HOST:PORT`` of the metrics; empty until ``wait`` returns.
        http_address: ``HOST:PORT`` of the HTTP server; empty without its flag.
    """

    def __init__(
        self,
        flags: Sequence[str] = (),
        *,
        environment: Mapping[str, str] | None = None,
        echo: bool = False,
    ) -> None:
        self.address = ""
        self.metrics_address = ""
        self.http_address = ""
        self._echo = echo
        self._tail: collections.deque[bytes] = collections.deque(maxlen=_TAIL_LINES)
        # Set when the server serves, or when it has closed its standard error.
        self._settled = threading.Event()
        # A server that writes to a terminal draws progress bars.
        reader, writer = os.openpty() if echo and sys.stderr.isatty() else os.pipe()
        ports = ["--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0"]
        # This class parses the log, so override the format that the environment may set.
        ports += ["--log-format", "text"]
        command = [sys.executable, "-m", "turret.server.cli", "serve", *ports, *flags]
        if sys.platform == "linux":
            command = [
                sys.executable,
                "-I",
                "-S",
                "-c",
                _TIED_TO_PARENT,
                str(os.getpid()),
                *command,
            ]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        except OSError:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self._thread = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def wait(self, timeout_seconds: float = 300.0) -> None:
        """Return once the server serves.

        Raises:
            ServerProcessError: The server ended, or did not serve in time.
        """
        if not self._settled.wait(timeout_seconds):
            raise ServerProcessError(
                f"the server did not serve within {timeout_seconds:g} s{self._unseen_log()}"
            )
        if not self.address:
            self._thread.join()
            raise ServerProcessError(
                f"the server ended with exit code {self.process.wait()}{self._unseen_log()}"
            )

    def stop(self, timeout_seconds: float = 45.0) -> int:
        """Let the server finish, or kill it at the timeout; returns its exit code. Idempotent."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
        code = self.process.wait()
        self._thread.join()
        return code

    @property
    def log_tail(self) -> str:
        """The last lines that the server wrote."""
        return b"\n".join(self._tail).decode(errors="replace")

    def _unseen_log(self) -> str:
        return "" if self._echo else f":\n{self.log_tail}"

    def _read(self, reader: int) -> None:
        rest = b""
        with open(reader, "rb", buffering=0) as stream:
            while True:
                try:
                    data = stream.read(_READ_BYTES)
                except OSError:
                    # Linux reports the end of a pseudo-terminal with this error.
                    data = b""
                if not data:
                    break
                if self._echo and not self._settled.is_set():
                    sys.stderr.buffer.write(data)
                    sys.stderr.buffer.flush()
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._take(line.rstrip(b"\r"))
        if rest:
            self._take(rest)
        self._settled.set()

    def _take(self, line: bytes) -> None:
        self._tail.append(line)
        if found := _METRICS.search(line):
            self.metrics_address = found[1].decode()
        if found := _HTTP.search(line):
            self.http_address = found[1].decode()
        if found := _SERVING.search(line):
            self.address = found[1].decode()
            self._settled.set()
