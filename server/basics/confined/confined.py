"""A child process that answers jobs, and that is killed when a job takes too much."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from turret.server.basics.byte_size import format_byte_size

# A job that hardly gets any processor time ends after this.
TIMEOUT_SECONDS = 30.0
_CHILD = Path(__file__).with_name("child.py")
_READ_BYTES = 1 << 20
_ENDED = "cannot be answered: its process was ended"


class ConfinedError(Exception):
    """A job was not answered.

    Attributes:
        answers: The answers that came before.
        is_over_limit: Whether the job met one of its own limits.
    """

    def __init__(self, why: str, answers: list[Any], is_over_limit: bool) -> None:
        super().__init__(why)
        self.answers = answers
        self.is_over_limit = is_over_limit


class Confined:
    """Runs a program of turret's on what strangers wrote. Thread-safe; one job at a time.

    The process starts with the first job and serves the next ones too. After a job that met a
    limit, the next job gets a new process.

    Args:
        program: File that defines ``answers(job)``, a generator of the answers to a job. It may
            import the standard library and ``packages``.
        cpu_seconds: Limit of processor time for each job, so that a busy machine refuses no job
            that an idle one answers.
        max_bytes: Limit of the address space.
        max_answer_bytes: Limit of all answers to a job.
        packages: Installed packages that the program imports.
    """

    def __init__(
        self,
        program: Path,
        *,
        cpu_seconds: float,
        max_bytes: int,
        max_answer_bytes: int,
        packages: Sequence[str] = (),
    ) -> None:
        self._program = program
        self._cpu_seconds = cpu_seconds
        self._max_bytes = max_bytes
        self._max_answer_bytes = max_answer_bytes
        self._packages = packages
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def ask(self, job: object) -> list[Any]:
        """The answers to a job; both are JSON.

        Raises:
            ConfinedError: The job met a limit, or something else ended the process.
        """
        line = json.dumps(job, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        output = bytearray()
        with self._lock:
            process = self._started()
            why = self._exchange(process, line, output)
            if why is not None:
                self._end()
        # The process may have ended in the middle of the last line.
        lines = [answer for answer in output.split(b"\n")[:-1] if answer]
        answers = [json.loads(answer.decode("utf-8", "surrogatepass")) for answer in lines]
        if why is not None:
            raise ConfinedError(why, answers, is_over_limit=why != _ENDED)
        return answers

    def close(self) -> None:
        """Kill the process, and with it a job that runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        process = self._process
        if process is None or process.poll() is not None:
            limits = [str(self._cpu_seconds), str(self._max_bytes)]
            packages = [_directory_of(package) for package in self._packages]
            self._end()
            self._process = process = subprocess.Popen(
                [sys.executable, "-I", "-S", _CHILD, self._program, *limits, *packages],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
            self._end = weakref.finalize(self, _end, process)
        return process

    def _exchange(
        self, process: subprocess.Popen[bytes], line: bytes, output: bytearray
    ) -> str | None:
        """Send a job and read its answers; returns why there are not all of them."""
        assert process.stdin is not None
        assert process.stdout is not None
        sink, source = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(sink, False)
        left = memoryview(line)
        end = time.monotonic() + TIMEOUT_SECONDS
        poll = select.poll()
        poll.register(sink, select.POLLOUT)
        poll.register(source, select.POLLIN)
        while output != b"\n" and output[-2:] != b"\n\n":
            events = dict(poll.poll(max(0.0, end - time.monotonic()) * 1000))
            if not events:
                return f"takes longer than {TIMEOUT_SECONDS:g} s"
            if events.get(source):
                piece = os.read(source, _READ_BYTES)
                if not piece:
                    return self._why_ended(process)
                output += piece
                if len(output) > self._max_answer_bytes:
                    return f"writes more than {format_byte_size(self._max_answer_bytes)}"
            elif left:
                # A process that has ended says so at its standard output.
                with contextlib.suppress(BrokenPipeError):
                    left = left[os.write(sink, left) :]
                if not left:
                    poll.unregister(sink)
        return None

    def _why_ended(self, process: subprocess.Popen[bytes]) -> str:
        code = process.wait()
        if code == -signal.SIGPROF:
            return f"takes more than {self._cpu_seconds:g} s of processor time"
        # Python's own exit code after an exception that nobody caught.
        return (
            f"needs more than {format_byte_size(self._max_bytes)} of memory"
            if code == 1
            else _ENDED
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def _directory_of(package: str) -> str:
    """The directory that a package was installed into."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parents[1])
