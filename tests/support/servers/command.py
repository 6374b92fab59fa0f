"""The client verbs of the command, run in this process."""

from __future__ import annotations

import argparse

from turret.clients.verbs import add_verbs


def parse_and_run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="turret")
    add_verbs(parser.add_subparsers(required=True))
    args = parser.parse_args(arguments)
    return args.func(args)
