"""The client verbs of the ``turret`` command.

Each sets ``func(args) -> int``, the exit code: 0, 1 if a call failed, 2 if an argument makes no
sense, 130 if interrupted.
"""

from __future__ import annotations

import argparse

from turret.clients.verbs import adapters, chat, eval, generate, score


def add_verbs(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verbs to a command's parser."""
    for verb in (generate, chat, score, eval, adapters):
        verb.add_parser(subparsers)
