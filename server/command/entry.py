"""The entry point of the ``turret`` command, which loads quickly, and its signals.

Ctrl-C and SIGTERM raise exceptions. While libraries load, they end the process instead, because an
exception would pass through C++ code, some of which aborts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
_SHOW_CURSOR = "\x1b[?25h"


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM, and handled like Ctrl-C."""


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """128 plus the signal's number, as in a shell."""
    return EXIT_TERMINATED if isinstance(interrupt, Terminated) else EXIT_INTERRUPTED


@contextlib.contextmanager
def raising_terminated() -> Iterator[None]:
    """Make SIGTERM raise :class:`Terminated` in the block, unless it already has a handler."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise_terminated(*_: object) -> None:
    raise Terminated


@contextlib.contextmanager
def ending_at_interrupts(said: str) -> Iterator[None]:
    """Make signals end the process at once in the block, without an exception.

    Args:
        said: The last line for the process to print.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raising = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _raise_terminated}
    caught = {kind: how for kind, how in raising.items() if signal.getsignal(kind) is how}

    def end(number: int, *_: object) -> None:
        # A progress bar may have hidden the cursor.
        cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
        os.write(sys.stderr.fileno(), f"{cursor}\n{said}\n".encode())
        os._exit(128 + number)

    for kind in caught:
        signal.signal(kind, end)
    try:
        yield
    finally:
        for kind, how in caught.items():
            signal.signal(kind, how)


class Hangup:
    """Detects a SIGHUP from a closed terminal, which should end the process."""

    def __init__(self) -> None:
        self._had_terminal = _has_terminal()

    def is_of_terminal(self) -> bool:
        """Whether the terminal has closed. Any other SIGHUP is a request to read files again."""
        return self._had_terminal and not _has_terminal()


def _has_terminal() -> bool:
    # A closed terminal no longer counts as one.
    return any(os.isatty(descriptor) for descriptor in (0, 1, 2))


def take_signals_of_a_start() -> None:
    """Handle signals as a server does, until the server handles them itself.

    SIGTERM ends the process with exit code 0. SIGHUP, which makes a server read files again, has
    no effect yet.
    """
    for kind, how in (
        (signal.SIGTERM, lambda *_: os._exit(0)),
        (signal.SIGHUP, signal.SIG_IGN),
    ):
        # Leave ignored signals ignored, for instance under nohup.
        if signal.getsignal(kind) is signal.SIG_DFL:
            signal.signal(kind, how)


def main() -> int:
    """Run the command in ``sys.argv``; returns its exit code."""
    # Until something catches KeyboardInterrupt, Ctrl-C ends the process without a traceback. In a
    # background job, where Ctrl-C is ignored, it stays ignored.
    is_caught = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_caught:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1:2] == ["serve"]:
        take_signals_of_a_start()
    from turret.server import cli

    if "_ARGCOMPLETE" in os.environ:
        cli.complete()
    return cli.main(catches_interrupts=is_caught)


if __name__ == "__main__":
    sys.exit(main())
