"""The client verbs of the ``turret`` command.

Each sets ``func(args) -> int``, the exit code: 0, 1 if a call failed, 2 if an argument makes no
sense, 130 if interrupted.
"""

from __future__ import annotations

import argparse

from turret.clients import adapters_verb, chat_verb, eval_verb, generate_verb, score_verb


def add_verbs(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verbs to a command's parser."""
    for verb in (generate_verb, chat_verb, score_verb, eval_verb, adapters_verb):
        verb.add_parser(subparsers)
