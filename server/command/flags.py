"""The settings of ``turret serve``, from flags, ``TURRET_…`` variables and a TOML file.

Flags override variables, and variables override the file. All three are derived from
``server/config.py``. The TOML file has a table for each dataclass there. Its keys are the flags'
names with underscores: ``[listen]`` holds ``http_address``, whose variable is
``TURRET_HTTP_ADDRESS``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic.fields import FieldInfo

from turret.server.basics.files import unreadable
from turret.server.basics.names import closest, model_place
from turret.server.basics.settings import (
    Layer,
    SettingsError,
    Typed,
    Violation,
    fields_of,
    is_listed,
    is_optional,
    is_path,
    is_switch,
    load,
    parse_toml,
    show,
    shown_of,
    tables_of,
    text_of,
)
from turret.server.command.start_lines import note, refuse
from turret.server.config import Config
from turret.server.words import Text, say

C = TypeVar("C", bound=Config)

PREFIX = "TURRET_"
CONFIG_VARIABLE = "TURRET_CONFIG"
# Variables with this prefix that belong to the clients, the kernels or the image.
_OTHERS = frozenset(
    PREFIX + name for name in ("CONFIG", "TOKEN", "TLS_CA", "ISA", "NATIVE", "HEALTH_FLAGS")
)


@cache
def settings(model: type[Config] = Config) -> Mapping[str, tuple[str, FieldInfo]]:
    """Name of each setting → its table and its field, in the order of the flags."""
    return {
        name: (table, info)
        for table, kind in tables_of(model).items()
        for name, info in fields_of(kind).items()
    }


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def variable_of(name: str) -> str:
    """The variable of a setting."""
    return PREFIX + name.upper()


@dataclass(frozen=True, slots=True)
class Settings(Generic[C]):
    """The settings that were given, with their origins.

    Attributes:
        model: The class of the configuration.
        layers: The sources of values; the first one that has a value wins.
        notes: Variables that have no effect, and are probably misspelt settings.
    """

    model: type[C]
    layers: tuple[Layer, ...] = ()
    notes: tuple[Violation, ...] = ()

    def config(self) -> C:
        """The checked configuration.

        Raises:
            SettingsError: Reports all invalid values and invalid combinations.
        """
        return load(self.model, self.layers)

    def place(self, field: str) -> str:
        """The place of a setting's value: its flag, its variable, or its key in the file."""
        table, _, name = field.partition(".")
        name, _, part = name.partition(".")
        if name not in settings(self.model):
            files = [each.origin for each in self.layers if table in each.values]
            return f"{files[-1]}: {field}" if files else field
        shown = self.origin(table, name) or flag_of(name)
        if shown not in (flag_of(name), variable_of(name)):
            shown = f"{shown}: {table}.{name}"
        return f"{shown} {part}" if part else shown

    def placed(self, found: Iterable[Violation]) -> list[tuple[str, Text]]:
        """Violations with the places where the settings were given."""
        return [(self.place(field), text) for field, text in found]

    def origin(self, table: str, name: str) -> str:
        """The flag, the variable or the file that gives a setting; empty for the default."""
        for layer in self.layers:
            if name in _keys(layer, table):
                return layer.origin or flag_of(name)
        return ""

    def entries(self, config: C) -> Iterator[tuple[str, Any, str]]:
        """``table.key``, value and origin of every setting."""
        for name, (table, _) in settings(self.model).items():
            value = getattr(getattr(config, table), name)
            yield f"{table}.{name}", value, self.origin(table, name)

    def lines(self, config: C, *, with_defaults: bool = False) -> list[str]:
        """The settings and their origins, as lines."""
        fields = settings(self.model)
        return [
            f"{key} = {show(fields[key.partition('.')[2]][1], value)}  ({origin or 'default'})"
            for key, value, origin in self.entries(config)
            if with_defaults or origin
        ]

    def as_json(self, config: C, *, with_defaults: bool = False) -> dict[str, Any]:
        """The settings and their origins, for programs."""
        return {
            key: {"value": value, "origin": origin or "default"}
            for key, value, origin in self.entries(config)
            if with_defaults or origin
        }


def _keys(layer: Layer, table: str) -> Mapping[str, Any]:
    keys = layer.values.get(table)
    return keys if isinstance(keys, dict) else {}


def add_flags(
    parser: argparse.ArgumentParser, model: type[Config] = Config, hidden: Collection[str] = ()
) -> None:
    """Add a group of flags for each table, and a flag for each setting.

    A flag that is not given is absent from the namespace, because a file or a variable may set it.

    Args:
        parser: The parser that gets the flags.
        model: The class of the configuration.
        hidden: Names of settings that the help omits.
    """
    # By default, argparse would list all flags in the usage.
    parser.usage = "%(prog)s [flags]"
    parser.add_argument(
        "--config",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help=f"TOML file; flags and variables override its settings (default: ${CONFIG_VARIABLE})",
    )
    groups = {
        name: parser.add_argument_group(name, kind.__doc__)
        for name, kind in tables_of(model).items()
    }
    for name, (table, info) in settings(model).items():
        keywords: dict[str, Any] = {"help": argparse.SUPPRESS if name in hidden else _help(info)}
        if is_switch(info):
            # A --no-… flag overrides a file or a variable.
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["metavar"] = shown_of(info)
            keywords["action"] = "append" if is_listed(info) else "store"
        groups[table].add_argument(flag_of(name), dest=name, default=argparse.SUPPRESS, **keywords)


def _help(info: FieldInfo) -> str:
    text = info.description or ""
    if info.default in (None, ()) or is_switch(info):
        return text
    return f"{text} (default: {show(info, info.default)})"


def read_settings(
    args: argparse.Namespace, environ: Mapping[str, str], model: type[C] = Config
) -> Settings[C]:
    """The settings of the flags, the environment and the file.

    Raises:
        SettingsError: The file cannot be read, or is not TOML.
    """
    given = vars(args)
    flags = {n: given[n] for n in settings(model) if n in given}
    layers = [_layer("", flags, model)]
    for name in settings(model):
        # An empty variable counts as unset.
        if text := environ.get(variable_of(name), ""):
            layers.append(_layer(variable_of(name), {name: text}, model))
    origin = "--config" if "config" in given else CONFIG_VARIABLE
    file = given["config"] if "config" in given else environ.get(CONFIG_VARIABLE) or None
    if file == "":
        raise SettingsError(Violation(origin, say("EMPTY")))
    if file is not None:
        layers.append(read_file(Path(file), origin, model))
    return Settings(model, tuple(layers), unknown_variables(environ, model))


def _layer(origin: str, values: Mapping[str, Any], model: type[Config]) -> Layer:
    tables: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        table, info = settings(model)[name]
        is_none = value == "none" and is_optional(info)
        given = Typed(value) if isinstance(value, str) else value
        tables.setdefault(table, {})[name] = None if is_none else given
    return Layer(origin, tables)


def unknown_variables(
    environ: Mapping[str, str], model: type[Config] = Config
) -> tuple[Violation, ...]:
    """A note for each ``TURRET_…`` variable that looks like a misspelt setting."""
    known = {variable_of(name) for name in settings(model)} | _OTHERS
    # Compare the names without their common prefix, which would make all of them similar.
    endings = [name.removeprefix(PREFIX) for name in known]
    notes = []
    for name in sorted(environ):
        meant = closest(name.removeprefix(PREFIX), endings) if name.startswith(PREFIX) else None
        if meant is not None and name not in known:
            notes.append(Violation(name, say("UNKNOWN_VARIABLE", closest=PREFIX + meant)))
    return tuple(notes)


def read_file(path: Path, origin: str = "--config", model: type[Config] = Config) -> Layer:
    """The layer of a TOML file; paths in it are relative to the directory of the file.

    Args:
        path: The file.
        origin: The flag or variable that names the file.
        model: The class of the configuration.

    Raises:
        SettingsError: The file cannot be read, or is not TOML.
    """
    try:
        tables = parse_toml(path.read_bytes())
    except OSError as error:
        raise SettingsError(Violation(origin, unreadable(path, error))) from None
    except ValueError as error:
        raise SettingsError(Violation(str(path), text_of(error))) from None
    for name, (table, info) in settings(model).items():
        keys = tables.get(table)
        if isinstance(keys, dict) and isinstance(keys.get(name), str) and keys[name]:
            keys[name] = _from_file(info, name, keys[name], path.parent)
    return Layer(str(path), tables)


def _from_file(info: FieldInfo, name: str, value: str, folder: Path) -> Any:
    if value == "none" and is_optional(info):
        return None
    if is_path(info):
        return model_place(value, folder) if name == "model" else folder / value
    return value


def resolved(
    args: argparse.Namespace, command: str, model: type[C] = Config
) -> tuple[Settings[C], C] | None:
    """The settings of the process, and the configuration; None if an error was reported."""
    is_json = getattr(args, "log_format", os.environ.get("TURRET_LOG_FORMAT")) == "json"
    settings = Settings(model)
    try:
        settings = read_settings(args, os.environ, model)
        formats = (_keys(layer, "log").get("log_format") for layer in settings.layers)
        is_json = next(filter(None, formats), "") == "json"
        config = settings.config()
    except SettingsError as error:
        refuse(settings.placed(error.violations), is_json=is_json, command=command)
        return None
    note(settings.placed(settings.notes), is_json=is_json, command=command)
    return settings, config
