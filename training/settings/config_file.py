"""The config as a TOML file: read, overridden by key, written with or without comments."""

from __future__ import annotations

import dataclasses
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from turret.server.basics.files import unreadable
from turret.server.basics.settings import (
    Layer,
    SettingsError,
    Violation,
    fields_of,
    load,
    tables_of,
    text_of,
)
from turret.server.basics.toml_text import parse_toml, toml_value
from turret.training.errors import ConfigError, ConfigFileError
from turret.training.settings.config import TrainConfig
from turret.training.words import say

_COMMENT_COLUMNS = 96


def read_config(
    path: Path, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Read a file.

    Args:
        path: TOML, with a table per field of :class:`TrainConfig`.
        overrides: ``TABLE.KEY=VALUE``, the value in TOML or as a bare string; later ones win.
        flags: Table → key → value, over both.

    Raises:
        ConfigFileError: It cannot be read, or has unknown keys or wrong values: all of them.
    """
    try:
        tables = parse_toml(path.read_bytes())
    except IsADirectoryError as error:
        # Prefer RUN.toml beside the directory to the config.toml that the run wrote into it.
        beside = (Path(f"{path}.toml"), path / "config.toml")
        near = next((str(each) for each in beside if each.is_file()), None)
        text = say("FILE_UNREADABLE", path=path, why=error.strerror, closest=near)
        raise ConfigFileError(Violation("", text)) from error
    except OSError as error:
        text = unreadable(path, error)
        if isinstance(error, FileNotFoundError) and "closest" not in text.params:
            text = say("NO_CONFIG", path=path)
        raise ConfigFileError(Violation("", text)) from error
    except ValueError as error:
        raise ConfigFileError(Violation("", text_of(error)), path=path) from error
    try:
        return build_config(tables, overrides, flags)
    except ConfigError as error:
        raise ConfigFileError(*error.violations, path=path) from None


def build_config(
    tables: Mapping[str, Any],
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Make a config of a TOML file's tables; as :func:`read_config`, whose errors name the file."""
    given: dict[str, dict[str, Any]] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        table, dot, key = name.strip().partition(".")
        if not (equals and dot and table and key):
            raise ConfigError(Violation("--set", say("NOT_KEY_VALUE", value=override)))
        given.setdefault(table, {})[key] = _parse_value(text)
    empty: dict[str, Any] = {table: {} for table in tables_of(TrainConfig)}
    try:
        layers = (flags or {}, given, empty | dict(tables))
        return load(TrainConfig, [Layer("", each) for each in layers])
    except SettingsError as error:
        raise ConfigError(*error.violations) from None


def _parse_value(text: str) -> Any:
    text = text.strip()
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def render_config(config: TrainConfig) -> str:
    """Every key that has a value, without comments: what a run records."""
    lines = []
    for table in dataclasses.fields(config):
        part = getattr(config, table.name)
        lines += ["", f"[{table.name}]"]
        for entry in dataclasses.fields(part):
            value = getattr(part, entry.name)
            if value is not None:
                lines.append(f"{entry.name} = {toml_value(value)}")
    return "\n".join(lines[1:]) + "\n"


def render_commented() -> str:
    """The file of ``turret train init``: every key, its default, what it means, who chooses it."""
    lines = [
        "# What to train, for `turret train plan|run|sweep`. Keys that are commented out are",
        "# chosen for you, by method and machine: `turret train plan` shows the choices.",
    ]
    for table, kind in tables_of(TrainConfig).items():
        summary = (kind.__doc__ or "").replace("``", "`").split("\n\n")
        lines += ["", *_comment(" ".join(part.replace("\n", " ") for part in summary))]
        lines.append(f"[{table}]")
        for name, info in fields_of(kind).items():
            extra: Any = info.json_schema_extra
            note = f" (left out: {extra['chosen']})" if extra["chosen"] else ""
            lines += _comment((info.description or "") + note)
            mark = "# " if info.default is None else ""
            shown = extra["sample"] if mark or info.is_required() else info.default
            lines.append(f"{mark}{name} = {toml_value(shown)}")
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), _COMMENT_COLUMNS)]
