"""Ctrl-C and SIGTERM: as exceptions, and as ends while libraries load.

An exception then passes through C++ code, some of which aborts.
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
    """SIGTERM, which unwinds as Ctrl-C does."""


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """128 and the signal's number, as a shell counts."""
    return EXIT_TERMINATED if isinstance(interrupt, Terminated) else EXIT_INTERRUPTED


@contextlib.contextmanager
def raising_terminated() -> Iterator[None]:
    """While inside, SIGTERM raises :class:`Terminated`, unless somebody else has taken it."""
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
    """While inside, what would raise ends the process at once, without an exception.

    Args:
        said: The process's last words.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raising = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _raise_terminated}
    caught = {kind: how for kind, how in raising.items() if signal.getsignal(kind) is how}

    def end(number: int, *_: object) -> None:
        # A progress bar has hidden it.
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
