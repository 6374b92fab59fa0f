"""The program of a confined child process, which answers jobs that contain untrusted input.

``confined.py`` runs this file by its path, in an interpreter that cannot import turret and that
sees only the packages it is given. Jobs come as lines of JSON on standard input. Each answer is a
line of JSON on standard output, and an empty line follows the last answer to a job. If the program
raises an exception, the last answer is ``{"error": …}``.
"""

from __future__ import annotations

import json
import resource
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

_START_FAILED = 3
_MAX_ERROR_CHARS = 1000


def main(program: str, cpu_seconds: str, max_bytes: str, *packages: str) -> None:
    """Answer jobs until standard input ends.

    Args:
        program: Path of the file that defines ``answers``, which yields the answers to a job.
        cpu_seconds: Limit on processor time for each job. At the limit, SIGPROF ends the process,
            even while it is inside a C function.
        max_bytes: Limit on the address space.
        packages: Directories to import packages from.
    """
    # Ctrl-C reaches the whole process group, but the parent decides when its children end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path += packages
    try:
        answers = runpy.run_path(program)["answers"]
    except Exception:
        # The program cannot be loaded, for example for lack of memory. No job is to blame.
        sys.exit(_START_FAILED)
    resource.setrlimit(resource.RLIMIT_AS, (int(max_bytes), int(max_bytes)))
    output = sys.stdout.buffer
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, float(cpu_seconds))
        for answer in _answered(answers, json.loads(line.decode("utf-8", "surrogatepass"))):
            text = json.dumps(answer, ensure_ascii=False) + "\n"
            output.write(text.encode("utf-8", "surrogatepass"))
            output.flush()
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        output.write(b"\n")
        output.flush()


def _answered(answers: Callable[[Any], Iterator[Any]], job: Any) -> Iterator[Any]:
    try:
        yield from answers(job)
    except MemoryError:
        # End the process: it has no memory left.
        raise
    except BaseException as error:
        # BaseException includes panics of libraries in Rust.
        yield {"error": f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS]}


if __name__ == "__main__":
    main(*sys.argv[1:])
