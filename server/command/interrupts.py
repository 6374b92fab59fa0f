"""Ctrl-C while libraries load: an exception then passes through C++ code, some of which aborts."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

EXIT_INTERRUPTED = 130
_SHOW_CURSOR = "\x1b[?25h"


@contextlib.contextmanager
def ending_at_interrupts(said: str) -> Iterator[None]:
    """While inside, Ctrl-C ends the process at once, without an exception.

    Args:
        said: The process's last words.
    """
    is_caught = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_caught or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        # A progress bar has hidden it.
        cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
        os.write(sys.stderr.fileno(), f"{cursor}\n{said}\n".encode())
        os._exit(EXIT_INTERRUPTED)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
