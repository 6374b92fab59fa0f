"""The command line of ``turret serve``, derived from the dataclasses in ``server/config.py``."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from turret.server.config import Config, format_byte_size, parse_byte_size


def _byte_size(text: str) -> int:
    try:
        return parse_byte_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _preload(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (equals and name and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def _optional_text(text: str) -> str | None:
    return None if text == "none" else text


def _argument(entry: dataclasses.Field[Any], annotation: Any) -> dict[str, Any]:
    """What ``add_argument`` needs for one field, from its type, default and metadata."""
    options = typing.get_args(annotation)
    is_optional = isinstance(annotation, types.UnionType) and type(None) in options
    inner = next(o for o in options if o is not type(None)) if is_optional else annotation
    unit = entry.metadata.get("unit")
    default: Any = entry.default
    shown = format_byte_size(default) if unit == "bytes" and default is not None else default
    note = "" if default in (None, ()) or annotation is bool else f" (default: {shown})"
    keywords: dict[str, Any] = {"help": entry.metadata["help"] + note, "default": default}
    if annotation is bool:
        return keywords | {"action": "store_true"}
    if typing.get_origin(annotation) is typing.Literal:
        return keywords | {"choices": options}
    if typing.get_origin(annotation) is tuple:
        is_pair = typing.get_origin(options[0]) is tuple
        return keywords | {
            "action": "append",
            "type": _preload if is_pair else str,
            "metavar": "NAME=PATH" if is_pair else entry.metadata["metavar"],
            "default": None,
        }
    if unit == "bytes":
        return keywords | {"type": _byte_size, "metavar": "BYTES"}
    if inner is Path:
        return keywords | {"type": Path, "metavar": "PATH"}
    if inner is str:
        kind = _optional_text if is_optional else str
        return keywords | {"type": kind, "metavar": "ADDRESS"}
    return keywords | {"type": inner, "metavar": (unit or entry.name).upper()}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One group a concern, one kebab-case flag a field."""
    sections = typing.get_type_hints(Config)
    for section, kind in sections.items():
        group = parser.add_argument_group(section, kind.__doc__)
        hints = typing.get_type_hints(kind)
        for entry in dataclasses.fields(kind):
            flag = "--" + entry.name.replace("_", "-")
            group.add_argument(flag, dest=entry.name, **_argument(entry, hints[entry.name]))


def config_from_args(args: argparse.Namespace) -> Config:
    """The checked configuration.

    Raises:
        ValueError: A value is out of range or two do not fit together; names the flag.
    """
    parts: dict[str, Any] = {}
    for section, kind in typing.get_type_hints(Config).items():
        values = {entry.name: getattr(args, entry.name) for entry in dataclasses.fields(kind)}
        for entry in dataclasses.fields(kind):
            # A flag that may be repeated makes a list, and none if it is not given.
            if entry.default == ():
                values[entry.name] = tuple(values[entry.name] or ())
        parts[section] = kind(**values)
    return Config(**parts)
