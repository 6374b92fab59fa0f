"""The client verbs of the command, run in this process."""

from __future__ import annotations

import argparse
import pkgutil

from turret.clients.verbs import VERBS


def add_verbs(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add all verbs to a command's parser."""
    for text, add in VERBS.values():
        pkgutil.resolve_name(add)(subparsers, text)


def parse_and_run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="turret")
    add_verbs(parser.add_subparsers(required=True))
    args = parser.parse_args(arguments)
    return args.func(args)
