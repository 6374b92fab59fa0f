"""What ``turret serve`` would refuse of its flags, without starting anything."""

from __future__ import annotations

import argparse

from turret.server.command.flags import add_flags, config_from_args
from turret.server.command.preflight import problems
from turret.server.config import Config


def parse(*arguments: str) -> Config:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return config_from_args(parser.parse_args(arguments), {})


def found(*arguments: str) -> list[str]:
    free = ("--address", "127.0.0.1:0", "--metrics-address", "none")
    return problems(parse(*free, *arguments))
