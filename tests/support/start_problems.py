"""The problems that ``turret serve`` would report for its flags, without a start."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from turret.server.basics.settings import SettingsError, Violation
from turret.server.command.flags import Settings, add_flags, read_settings
from turret.server.command.preflight import problems
from turret.server.config import Config


def read(*arguments: str, environ: Mapping[str, str] | None = None) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return read_settings(parser.parse_args(arguments), environ or {})


def parse(*arguments: str, environ: Mapping[str, str] | None = None) -> Config:
    return read(*arguments, environ=environ).config()


def found(*arguments: str) -> list[Violation]:
    free = ("--address", "127.0.0.1:0", "--metrics-address", "none")
    return problems(parse(*free, *arguments))


def refused(*arguments: str, environ: Mapping[str, str] | None = None) -> set[tuple[str, str]]:
    """The field and reason of each invalid setting."""
    try:
        parse(*arguments, environ=environ)
    except SettingsError as error:
        return {(field, text.reason) for field, text in error.violations}
    return set()


def reasons(*arguments: str) -> list[tuple[str, str]]:
    """The field and reason of each problem at startup."""
    return [(field, text.reason) for field, text in found(*arguments)]
