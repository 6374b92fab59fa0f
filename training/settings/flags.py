"""The flags that the verbs of ``turret train`` share, and errors in terms of these flags."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from turret.server.basics.names import HubId
from turret.server.basics.settings import Typed, fields_of, is_switch, shown_of, tables_of
from turret.server.errors import TurretError
from turret.training.settings import TrainConfig
from turret.training.words import ConfigError, say

# The default niceness gives a server on the same machine priority over training.
_NICENESS = 5
_NICEST = 19
# Flags that take paths relative to the working directory. In the file and with --set, paths are
# relative to the config file.
_PATHS = ("--model", "--train", "--validation", "--output")
# Keys without a flag: lists of paths can be set only in the file.
_WITHOUT_FLAG = ("method.components",)


def flags() -> Iterator[tuple[str, str, FieldInfo]]:
    """Flag, key and field of every key that has a flag."""
    for table, kind in tables_of(TrainConfig).items():
        for name, info in fields_of(kind).items():
            key = f"{table}.{name}"
            if key not in _WITHOUT_FLAG:
                # Two tables have a key called name; its flags are --method and --optimizer.
                yield f"--{(table if name == 'name' else name).replace('_', '-')}", key, info


def config_parser(*left_out: str) -> argparse.ArgumentParser:
    """A parent for the verbs that read a config.

    Args:
        left_out: The flags that the verb lacks.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file (turret train init)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="override a key; paths are relative to the config file; repeatable",
    )
    keys = parser.add_argument_group(
        "keys of the config", "paths are relative to the working directory"
    )
    for flag, key, info in flags():
        if flag in left_out:
            continue
        extra: Any = info.json_schema_extra
        default = extra["chosen"] if info.default is None else info.default
        note = "" if info.is_required() else f" (default: {default})"
        text = f"{info.description}{note}".replace("%", "%%")
        if is_switch(info):
            action = argparse.BooleanOptionalAction
            keys.add_argument(flag, dest=key, action=action, default=None, help=text)
        else:
            keys.add_argument(flag, dest=key, metavar=shown_of(info), help=text)
    parser.add_argument(
        "--threads",
        type=partial(whole, least=1, most=(1 << 16) - 1),
        metavar="N",
        help="number of computing threads (default: OMP_NUM_THREADS, else the processors that"
        " affinity and the container's quota allow)",
    )
    parser.add_argument(
        "--nice",
        type=partial(whole, least=0, most=_NICEST),
        default=_NICENESS,
        metavar="N",
        help="scheduling priority from 0 to 19; higher values give way to other processes"
        " (default: %(default)s)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    return parser


def given(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Table → key → value of every flag that was given."""
    found: dict[str, dict[str, Any]] = {}
    for flag, key, value in _flags_given(args):
        table, _, name = key.partition(".")
        value = _from_here(flag, value, args.config.parent) if flag in _PATHS else value
        found.setdefault(table, {})[name] = Typed(value) if isinstance(value, str) else value
    return found


def described(args: argparse.Namespace, error: Exception) -> list[str]:
    """A line for each fault, with the flag or the key at fault."""
    if isinstance(error, ConfigError):
        found, path = error.violations, error.path
    elif isinstance(error, TurretError) and error.violations and hasattr(args, "config"):
        # The server's own check of a model does not know the keys of a training config.
        found, path = [(f"base.{field}", text) for field, text in error.violations], None
    else:
        return [str(error)]
    places = [(_place(args, key, path), text) for key, text in found]
    return [f"{place}: {text}" if place else text for place, text in places]


def _place(args: argparse.Namespace, key: str, path: Path | None) -> str:
    """The origin of a key's value: the flag, or the key in the file."""
    if key.startswith("--"):
        return key
    if getattr(args, "ranks", None) and key == "method.rank":
        return "--ranks"
    for flag, named, _ in _flags_given(args):
        if named == key:
            return flag
    if any(text.partition("=")[0].strip() == key for text in getattr(args, "set", ())):
        return f"--set {key}"
    return ": ".join(each for each in (str(path or ""), key) if each)


def _flags_given(args: argparse.Namespace) -> list[tuple[str, str, Any]]:
    """Flag, key and value of every flag that was given."""
    values = [(flag, key, getattr(args, key, None)) for flag, key, _ in flags()]
    return [(flag, key, value) for flag, key, value in values if value is not None]


def _from_here(flag: str, value: str, folder: Path) -> str:
    """A flag's value; a path is made absolute, because it is relative to the working directory.

    A model that is not a path here may still be one in the config's directory, or be on the hub.
    """
    if flag == "--model" and not Path(value).exists():
        is_path = not (folder / value).exists() and HubId.find(value) is None
    else:
        is_path = bool(value)
    return str(Path(value).absolute()) if is_path else value


def whole(text: str, least: int, most: int) -> int:
    """The value of a flag that takes an integer, as argparse's ``type``."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(say("NOT_A_WHOLE_NUMBER", value=f'"{text:.40}"'))
    if not least <= int(text) <= most:
        shown = {"least": least, "most": most, "value": int(text)}
        raise argparse.ArgumentTypeError(say("NOT_IN_RANGE", **shown))
    return int(text)
