"""The command line of ``turret serve``, derived from the dataclasses in ``server/config.py``."""

from __future__ import annotations

import argparse
import os
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from turret.server.basics.byte_size import format_byte_size
from turret.server.basics.closest import path_meant
from turret.server.command.settings import (
    Setting,
    Settings,
    from_text,
    read_environment,
    read_file,
    settings,
    unknown_variables,
)
from turret.server.config import Config

CONFIG_VARIABLE = "TURRET_CONFIG"


def add_flags(parser: argparse.ArgumentParser, hidden: Collection[str] = ()) -> None:
    """One group a concern, one kebab-case flag a field.

    A flag that is not given leaves no trace in the namespace: a file or a variable may set it.

    Args:
        parser: Gets them.
        hidden: Names of settings that its help leaves out.
    """
    parser.add_argument(
        "--config",
        type=_config_file,
        metavar="PATH",
        default=argparse.SUPPRESS,
        help=f"TOML file of settings; flags and variables win (default: ${CONFIG_VARIABLE})",
    )
    sections = typing.get_type_hints(Config)
    groups = {
        name: parser.add_argument_group(name, kind.__doc__) for name, kind in sections.items()
    }
    for setting in settings():
        keywords = _argument(setting)
        if setting.name in hidden:
            keywords["help"] = argparse.SUPPRESS
        groups[setting.section].add_argument(
            setting.flag, dest=setting.name, default=argparse.SUPPRESS, **keywords
        )


def read_settings(args: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """The settings from the file, the environment and the flags; later ones take precedence.

    Raises:
        ValueError: A file that cannot be read, or a file or variable that makes no sense; names it.
    """
    given = vars(args)
    found = Settings(notes=unknown_variables(environ))
    file = given.get("config") or environ.get(CONFIG_VARIABLE)
    if file:
        try:
            found.update(read_file(Path(file)))
        except OSError as error:
            origin = "--config" if given.get("config") else CONFIG_VARIABLE
            raise ValueError(f"{origin}: {_why_unread(Path(file), error)}") from None
    found.update(read_environment(environ))
    for setting in settings():
        if setting.name in given:
            value = given[setting.name]
            found.put(setting, tuple(value) if setting.is_repeated else value, "")
    return found


def _config_file(text: str) -> Path:
    if not text:
        # Reject an unset shell variable, which as a path would mean the current directory.
        raise argparse.ArgumentTypeError("is empty")
    return Path(text)


def _why_unread(file: Path, error: OSError) -> str:
    if file.is_dir():
        return f"{file} is a directory; it is a TOML file of settings"
    near = "" if file.exists() else path_meant(file, Path.is_file)
    return f"{file}: {error.strerror}{near}"


def config_from_args(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Config:
    """The checked configuration; errors as in :func:`read_settings` and ``Settings.config``."""
    return read_settings(args, environ).config()


def _argument(setting: Setting) -> dict[str, Any]:
    """Keyword arguments of ``add_argument`` for a setting, from its type, default and metadata."""
    default = setting.default
    shown = default
    if setting.unit == "bytes" and isinstance(default, int):
        shown = format_byte_size(default)
    note = "" if default in (None, ()) or setting.type is bool else f" (default: {shown})"
    keywords: dict[str, Any] = {"help": setting.help + note}
    if setting.type is bool:
        # A --no-… flag overrides a file or a variable.
        return keywords | {"action": argparse.BooleanOptionalAction}
    if setting.choices:
        return keywords | {"choices": setting.choices}
    keywords |= {"type": _converter(setting), "metavar": setting.metavar}
    return keywords | ({"action": "append"} if setting.is_repeated else {})


def _converter(setting: Setting) -> Callable[[str], object]:
    def convert(text: str) -> object:
        try:
            return from_text(setting, text)
        except ValueError as error:
            # argparse hides the text of a ValueError.
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
