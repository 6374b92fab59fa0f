"""A child process that answers jobs, and is killed when a job exceeds its limits."""

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

from turret.server.basics.settings import format_byte_size
from turret.server.basics.work import is_out_of_memory
from turret.server.errors import UnavailableError
from turret.server.words import Text, say

# Limit on wall-clock time, for jobs that get hardly any processor time.
TIMEOUT_SECONDS = 60.0
_CHILD = Path(__file__).with_name("confined_child.py")
_READ_BYTES = 1 << 20
# Exit code of a child that failed before it read a job; see confined_child.py.
_START_FAILED = 3


class ConfinedError(Exception):
    """A job was not answered.

    Attributes:
        is_over_limit: Whether the job itself is to blame, because it reached a limit.
        answers: The answers before the failure.
    """

    def __init__(self, why: Text, *, is_over_limit: bool) -> None:
        super().__init__(why)
        self.is_over_limit = is_over_limit
        self.answers: list[Any] = []


class Confined:
    """Runs one of turret's programs on untrusted input. Thread-safe; one job at a time.

    The process starts with the first job and also runs the next ones. After a job that reached a
    limit, the next job gets a new process.

    Args:
        program: File that defines ``answers(job)``, a generator of the answers to a job. It may
            import the standard library and ``packages``.
        cpu_seconds: Limit on processor time for each job, so that a job's outcome does not depend
            on the machine's load.
        max_bytes: Limit on the address space.
        max_answer_bytes: Limit on the total size of the answers to a job.
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
        self._is_closed = False
        self._end: Callable[[], object] = lambda: None

    def ask(self, job: object) -> list[Any]:
        """The answers to a job. Both job and answers are JSON.

        Raises:
            ConfinedError: The job reached a limit, or the process ended for another reason.
            MemoryError, OSError: There is no memory to start the process.
        """
        line = json.dumps(job, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        output = bytearray()
        with self._lock:
            if self._is_closed:
                raise ConfinedError(say("PROCESS_KILLED"), is_over_limit=False)
            try:
                process = self._started()
            except OSError as error:
                if is_out_of_memory(error):
                    raise
                why = say("PROCESS_NOT_STARTED", problem=error.strerror)
                raise ConfinedError(why, is_over_limit=False) from error
            try:
                self._exchange(process, line, output)
            except ConfinedError as error:
                self._end()
                error.answers = _answers(output)
                raise
        return _answers(output)

    def ask_one(self, job: object, reason: str) -> Any:
        """The only answer to a job, a JSON object.

        Args:
            job: See ``ask``.
            reason: The reason of the error if the process ended without reaching a limit.

        Raises:
            ValueError: The program reports an error, or the job reached a limit.
            UnavailableError: The process ended in another way.
            MemoryError, OSError: See ``ask``.
        """
        try:
            (answer,) = self.ask(job)
        except ConfinedError as error:
            if error.is_over_limit:
                raise ValueError(*error.args) from None
            raise UnavailableError(say(reason, problem=error)) from None
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def close(self) -> None:
        """Kill the process and any running job. No further job is possible."""
        self._is_closed = True
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

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes, output: bytearray) -> None:
        """Send a job and read its answers."""
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
                why = say("PROCESS_SILENT", seconds=TIMEOUT_SECONDS)
                raise ConfinedError(why, is_over_limit=False)
            if events.get(source):
                piece = os.read(source, _READ_BYTES)
                if not piece:
                    raise self._end_of(process)
                output += piece
                if len(output) > self._max_answer_bytes:
                    why = say("PROCESS_OUTPUT_LIMIT", most=format_byte_size(self._max_answer_bytes))
                    raise ConfinedError(why, is_over_limit=True)
            elif left:
                # If the process has ended, its standard output reports that.
                with contextlib.suppress(BrokenPipeError):
                    left = left[os.write(sink, left) :]
                if not left:
                    poll.unregister(sink)

    def _end_of(self, process: subprocess.Popen[bytes]) -> ConfinedError:
        """The error for a process that ended by itself."""
        code = process.wait()
        if code in (-signal.SIGKILL, -signal.SIGTERM):
            return ConfinedError(say("PROCESS_KILLED"), is_over_limit=False)
        if code == _START_FAILED:
            why = say("PROCESS_NOT_STARTED", problem=f"exit code {code}")
            return ConfinedError(why, is_over_limit=False)
        if code == -signal.SIGPROF:
            why = say("PROCESS_TIME_LIMIT", seconds=self._cpu_seconds)
        elif code in (1, -signal.SIGABRT):
            # Without memory, Python exits with 1 after an uncaught exception, and Rust aborts.
            why = say("PROCESS_MEMORY_LIMIT", most=format_byte_size(self._max_bytes))
        else:
            why = say("PROCESS_CRASHED", exit_code=code)
        return ConfinedError(why, is_over_limit=True)


def _answers(output: bytearray) -> list[Any]:
    # The process may have ended in the middle of the last line.
    lines = [line for line in output.split(b"\n")[:-1] if line]
    return [json.loads(line.decode("utf-8", "surrogatepass")) for line in lines]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def _directory_of(package: str) -> str:
    """The directory in which a package is installed."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parents[1])
