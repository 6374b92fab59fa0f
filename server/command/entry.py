"""The entry point of the ``turret`` command. It loads quickly, and then loads the rest."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Run the command in ``sys.argv``; returns its exit code."""
    # Until something catches KeyboardInterrupt, Ctrl-C ends the process without a traceback. If it
    # is ignored (a background job), it stays ignored.
    is_caught = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_caught:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1:2] == ["serve"]:
        from turret.server.command.interrupts import take_signals_of_a_start

        take_signals_of_a_start()
    from turret.server import cli

    if "_ARGCOMPLETE" in os.environ:
        cli.complete()
    return cli.main(catches_interrupts=is_caught)


if __name__ == "__main__":
    sys.exit(main())
