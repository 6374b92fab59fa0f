"""Settings of ``turret serve`` from a TOML file and from ``TURRET_…`` variables.

A file has a table a section of ``server/config.py``, and in it the flags' names with underscores:
``[listen]`` holds ``http_address``. A variable is called after the flag: ``TURRET_HTTP_ADDRESS``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turret.server.basics.byte_size import parse_byte_size
from turret.server.basics.closest import closest, did_you_mean
from turret.server.basics.hub_id import model_place
from turret.server.basics.toml_text import parse_toml, toml_value
from turret.server.config import Config

PREFIX = "TURRET_"
# Variables with this prefix that belong to the clients, the kernels or the image.
_OTHERS = frozenset(
    PREFIX + name for name in ("CONFIG", "TOKEN", "TLS_CA", "ISA", "NATIVE", "HEALTH_FLAGS")
)
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_FLAG = re.compile(r"--([a-z][a-z-]*)")


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of the configuration.

    Attributes:
        section: Field of ``Config`` that holds it.
        name: In its dataclass, in a file, and with dashes as a flag.
        type: What a value is, without None; of a tuple, what a member is.
        choices: The only values, if there are few.
        default: Of the dataclass.
        is_optional: Whether None is a value; written ``none``.
        is_repeated: Whether it is a tuple; a flag then adds a member each time.
        help: For the reader, with the unit.
        unit: ``bytes``, ``seconds`` …; empty where there is none.
        metavar: Stands for the value in the flag's help.
        is_hub: Whether a path may be the id of a repository on the hub instead.
    """

    section: str
    name: str
    type: type
    choices: tuple[str, ...]
    default: object
    is_optional: bool
    is_repeated: bool
    help: str
    unit: str
    metavar: str
    is_hub: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def is_pairs(self) -> bool:
        """Whether a member is ``NAME=PATH``."""
        return self.type is tuple


@dataclass(slots=True)
class Settings:
    """Values by the setting's name, with where they come from.

    Attributes:
        values: Of the settings that were given.
        origins: The file or variable that gave each; empty for a flag.
        notes: What looks like a mistake and changes nothing.
    """

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def put(self, setting: Setting, value: object, origin: str) -> None:
        self.values[setting.name] = value
        self.origins[setting.name] = origin

    def update(self, other: Settings) -> None:
        self.values |= other.values
        self.origins |= other.origins

    def config(self) -> Config:
        """The checked configuration.

        Raises:
            ValueError: A value is out of range or two do not fit together; names the flag, and the
                file or variable that set it.
        """
        parts: dict[str, Any] = {}
        try:
            for section, kind in typing.get_type_hints(Config).items():
                names = [entry.name for entry in dataclasses.fields(kind)]
                given = {name: self.values[name] for name in names if name in self.values}
                parts[section] = kind(**given)
            return Config(**parts)
        except ValueError as error:
            raise ValueError(self.blamed(str(error))) from None

    def describe(self, config: Config) -> str:
        """Settings that differ from the defaults, a line each, with where they come from."""
        lines = []
        for line in config.changes():
            origin = self.origins.get(line.split(" ", 1)[0].partition(".")[2])
            lines.append(f"{line}  ({origin})" if origin else line)
        return "\n".join(lines)

    def blamed(self, message: str) -> str:
        """The message, followed by the file or variable that set the flag which it names."""
        names = [name.replace("-", "_") for name in _FLAG.findall(message)]
        given = {name: self.origins[name] for name in names if self.origins.get(name)}
        if not given:
            return message
        origins = ", ".join(f"{name} is from {origin}" for name, origin in given.items())
        return f"{message} ({origins})"


@functools.cache
def settings() -> tuple[Setting, ...]:
    """Every setting, in the order of the flags."""
    return tuple(
        _setting(section, entry, typing.get_type_hints(kind)[entry.name])
        for section, kind in typing.get_type_hints(Config).items()
        for entry in dataclasses.fields(kind)
    )


def _setting(section: str, entry: dataclasses.Field[Any], annotation: Any) -> Setting:
    options = typing.get_args(annotation)
    is_optional = isinstance(annotation, types.UnionType) and type(None) in options
    kind: Any = next(o for o in options if o is not type(None)) if is_optional else annotation
    is_choice = typing.get_origin(kind) is typing.Literal
    is_repeated = typing.get_origin(kind) is tuple
    if is_repeated:
        kind = tuple if typing.get_origin(options[0]) is tuple else options[0]
    unit = entry.metadata.get("unit", "")
    by_type = {Path: "PATH", str: "ADDRESS", tuple: "NAME=PATH"}
    metavar = by_type.get(kind) or (unit or entry.name).upper()
    return Setting(
        section=section,
        name=entry.name,
        type=str if is_choice else kind,
        choices=options if is_choice else (),
        default=entry.default,
        is_optional=is_optional,
        is_repeated=is_repeated,
        help=entry.metadata["help"],
        unit=unit,
        metavar=entry.metadata.get("metavar", metavar),
        is_hub=entry.metadata.get("hub", False),
    )


def from_text(setting: Setting, text: str) -> object:
    """Parse a value as a flag takes it; for a repeated setting, one member.

    Raises:
        ValueError: It is none.
    """
    if setting.is_pairs:
        name, equals, path = text.partition("=")
        if not (equals and name and path):
            raise ValueError(f"{text!r} is not NAME=PATH")
        return name, path
    if setting.is_optional and text == "none":
        return None
    if not text and setting.type in (Path, str):
        # Reject an unset shell variable, which as a path would mean the current directory.
        raise ValueError("is empty")
    if setting.unit == "bytes":
        return parse_byte_size(text)
    if setting.type is bool:
        if text.lower() not in (*_TRUE, *_FALSE):
            raise ValueError(f"{text!r} is neither true nor false")
        return text.lower() in _TRUE
    if setting.choices and text not in setting.choices:
        meant = did_you_mean(text, setting.choices)
        raise ValueError(f"{text!r} is none of {', '.join(setting.choices)}{meant}")
    if setting.is_hub:
        return model_place(text)
    try:
        return setting.type(text)
    except ValueError:
        kind = "a whole number" if setting.type is int else "a number"
        raise ValueError(f"{text!r} is not {kind}") from None


def read_environment(environ: Mapping[str, str]) -> Settings:
    """Settings from non-empty variables; commas separate the values of repeated ones.

    Raises:
        ValueError: A value makes no sense; names the variable.
    """
    found = Settings()
    for setting in settings():
        text = environ.get(setting.variable, "")
        if not text:
            continue
        try:
            value = (
                tuple(from_text(setting, part.strip()) for part in text.split(","))
                if setting.is_repeated
                else from_text(setting, text)
            )
        except ValueError as error:
            raise ValueError(f"{setting.variable}: {error}") from None
        found.put(setting, value, setting.variable)
    return found


def unknown_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    """A note for each ``TURRET_…`` variable that looks like a misspelt one."""
    known = {setting.variable for setting in settings()} | _OTHERS
    # Compare without the prefix that all names share.
    endings = [name.removeprefix(PREFIX) for name in known]
    notes = []
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in known:
            continue
        if meant := closest(name.removeprefix(PREFIX), endings):
            notes.append(f"{name} is no setting; did you mean {PREFIX + meant!r}?")
    return tuple(notes)


def read_file(path: Path) -> Settings:
    """A TOML file; paths in it are relative to the directory that it is in.

    Raises:
        ValueError: No TOML, or keys and values that make no sense; names file and key, a line each.
        OSError: It cannot be read.
    """
    try:
        tables = parse_toml(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    known = {(setting.section, setting.name): setting for setting in settings()}
    sections = list(dict.fromkeys(section for section, _ in known))
    found, wrong = Settings(), []
    for section, keys in tables.items():
        if section not in sections:
            wrong.append(_unknown_table(section, sections))
            continue
        if not isinstance(keys, dict):
            wrong.append(f"{section} must be a table: [{section}]")
            continue
        for key, value in keys.items():
            setting = known.get((section, key))
            if setting is None:
                wrong.append(_unknown_key(section, key))
                continue
            try:
                found.put(setting, _from_toml(setting, value, path.parent), str(path))
            except ValueError as error:
                wrong.append(f"{section}.{key}: {error}")
    if wrong:
        raise ValueError("\n".join(f"{path}: {each}" for each in wrong))
    return found


def _unknown_table(section: str, sections: list[str]) -> str:
    for setting in settings():
        if setting.name == section:
            return f"{section} belongs into the table [{setting.section}]"
    meant = did_you_mean(section, sections)
    return f"there is no table [{section}]{meant or '; there are ' + ', '.join(sections)}"


def _unknown_key(section: str, key: str) -> str:
    for setting in settings():
        if key in (setting.name, setting.flag.removeprefix("--")):
            right = f"[{setting.section}] {setting.name}"
            return f"[{section}] {key} is no setting; did you mean {right}?"
    meant = did_you_mean(key, [s.name for s in settings() if s.section == section])
    return f"[{section}] {key} is no setting{meant or '; `turret serve --help` lists them'}"


def _from_toml(setting: Setting, value: object, folder: Path) -> object:
    if setting.is_pairs and isinstance(value, dict):
        for name, path in value.items():
            if not isinstance(path, str):
                raise ValueError(f"{name} must be a path in quotes, not {toml_value(path):.60}")
        value = [f"{name}={path}" for name, path in value.items()]
    if setting.is_repeated:
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            table = f'{setting.name} = {{ sql = "sql-lora" }}, or a list of "{setting.metavar}"'
            kinds = f"a table, {table}" if setting.is_pairs else "a list of strings"
            raise ValueError(f"must be {kinds}, not {toml_value(value):.60}")
        return tuple(from_text(setting, part) for part in value)
    if isinstance(value, bool) or setting.type is bool:
        if type(value) is not setting.type:
            raise ValueError(f"must be {_kind(setting)}, not {toml_value(value):.60}")
        return value
    if setting.type is Path and isinstance(value, str) and value:
        return model_place(value, folder) if setting.is_hub else folder / value
    is_text = setting.unit == "bytes" or setting.type is str or value == ""
    if is_text and isinstance(value, str):
        return from_text(setting, value)
    if setting.type is float and isinstance(value, int | float):
        return float(value)
    if setting.type is int and isinstance(value, int):
        return value
    raise ValueError(f"must be {_kind(setting)}, not {toml_value(value):.60}")


def _kind(setting: Setting) -> str:
    if setting.unit == "bytes":
        return "a size such as '512MiB'"
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(setting.type, "a string")
