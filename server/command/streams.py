"""Reports standard streams that are closed or full in one line instead of a traceback."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

EXIT_FAILED = 1
EXIT_BROKEN_PIPE = 141


class OutputError(OSError):
    """Standard output could not be written. The text contains the reason."""


class _Messages(io.FileIO):
    """Standard error, which never fails: lines that nobody reads are dropped.

    A server therefore keeps running after ``head`` has read its log.
    """

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


class _StandardOutput(io.FileIO):
    """Standard output, which fails only once. Later output is dropped.

    Otherwise every later flush would fail again, including the interpreter's own at exit.
    """

    failure: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        if self.failure is not None:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except BrokenPipeError as error:
            self.failure = error
            raise
        except OSError as error:
            self.failure = OutputError(f"the output cannot be written: {error.strerror}")
            raise self.failure from None


def with_streams(run: Callable[[], int]) -> int:
    """Run a command of this process with usable streams.

    Args:
        run: The command. If it does not report a failure of its output, this function does.

    Returns:
        The exit code of the command or of its SystemExit, or 1 if output was lost.
    """
    _open_closed()
    output = _StandardOutput(sys.stdout.fileno(), "w", closefd=False)
    sys.stdout = _through(output, sys.stdout)
    sys.stderr = _through(_Messages(sys.stderr.fileno(), "w", closefd=False), sys.stderr)
    try:
        code = run()
    except BrokenPipeError as error:
        # The reader of the output has closed it, which is not an error.
        if error is not output.failure:
            raise
        code = EXIT_BROKEN_PIPE
    except OutputError as error:
        code = _report(error)
    except SystemExit as end:
        # The parser has already printed the reason. It ignores errors from writing its help.
        if isinstance(end.code, str):
            raise
        code = end.code or 0
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return code or EXIT_BROKEN_PIPE
    except OutputError as error:
        return _report(error)
    if code == 0 and isinstance(output.failure, OutputError):
        return _report(output.failure)
    return code


def _report(error: OutputError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return EXIT_FAILED


def _open_closed() -> None:
    """Open the null device for each closed stream, before a file or a socket gets its number.

    Otherwise, code that uses the stream, including compiled code, would read or write that file or
    socket. Writing to a closed output fails, so that a result is not lost silently.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDONLY if name == "stdout" else os.O_RDWR)
            os.set_inheritable(null, True)
            stream: TextIO = os.fdopen(
                null, "w" if number else "r", encoding="utf-8", closefd=False
            )
            setattr(sys, name, stream)


def _through(raw: io.FileIO, given: TextIO) -> io.TextIOWrapper:
    """A stream that writes to ``raw``, with the other properties of the given one."""
    assert isinstance(given, io.TextIOWrapper)
    # With python -u standard output has no buffer.
    is_raw = isinstance(given.buffer, io.RawIOBase)
    return io.TextIOWrapper(
        raw if is_raw else io.BufferedWriter(raw),  # type: ignore[arg-type]
        encoding=given.encoding,
        errors=given.errors,
        line_buffering=given.line_buffering,
        write_through=given.write_through,
    )
