"""Reports in one line, without a traceback, that the output cannot be written."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

EXIT_FAILED = 1
EXIT_BROKEN_PIPE = 141


def with_streams(run: Callable[[], int]) -> int:
    """Run a command, and write the rest of its output.

    Args:
        run: The command.

    Returns:
        The exit code of the command or of its SystemExit, or 1 if output was lost.
    """
    code = 0
    try:
        try:
            code = run()
        except SystemExit as end:
            # The parser has already printed the reason.
            if isinstance(end.code, str):
                raise
            code = end.code or 0
        print(end="", flush=True)
        return code
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # The interpreter writes the rest again when it ends, and would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            # The reader of the output has closed it, which is not an error.
            return code or EXIT_BROKEN_PIPE
        if code == 0:
            print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED
