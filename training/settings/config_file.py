"""The config as a TOML file: read strictly, overridden by key, written with or without comments."""

from __future__ import annotations

import dataclasses
import shlex
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from turret.clients.evaluation.rows import near_files
from turret.server.basics.closest import did_you_mean
from turret.server.basics.toml_text import parse_toml, toml_value
from turret.training.errors import ConfigError, ConfigFileError
from turret.training.settings.config import TrainConfig
from turret.training.settings.key_names import all_keys, meant_key

_COMMENT_COLUMNS = 96


def read_config(path: Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read a file.

    Args:
        path: TOML, with a table per field of :class:`TrainConfig`.
        overrides: ``TABLE.KEY=VALUE``, the value in TOML or as a bare string; later ones win.

    Raises:
        ConfigFileError: Not readable, unknown keys (all of them named), wrong types, bad values.
    """
    try:
        tables = parse_toml(path.read_bytes())
    except FileNotFoundError as error:
        step = near_files(path) or f"; `turret train init {shlex.quote(str(path))}` writes one"
        raise ConfigFileError(f"{path.absolute()} does not exist{step}") from error
    except IsADirectoryError as error:
        # Prefer RUN.toml beside the directory to the config.toml that the run wrote into it.
        beside = Path(f"{path}.toml")
        meant = next((each for each in (beside, path / "config.toml") if each.is_file()), None)
        step = near_files(beside) if meant is None else f"; did you mean {meant}?"
        raise ConfigFileError(f"{path} is a directory; a config is a TOML file{step}") from error
    except OSError as error:
        raise ConfigFileError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        step = ""
        if path.suffix in (".jsonl", ".json"):
            step = f"; examples are named beside a config: CONFIG --train {shlex.quote(str(path))}"
        raise ConfigFileError(f"{path}: {error}{step}") from error
    given = list(overrides)
    try:
        return build_config(tables, given)
    except ConfigError as error:
        names = [override.partition("=")[0].strip() for override in given]
        where = "" if any(name in str(error) for name in names) else f"{path}: "
        raise ConfigFileError(f"{where}{error}") from None


def build_config(tables: Mapping[str, Any], overrides: Iterable[str] = ()) -> TrainConfig:
    """Make a config of a TOML file's tables; as :func:`read_config`, whose errors name the file."""
    merged = {
        table: dict(keys) if isinstance(keys, dict) else keys for table, keys in tables.items()
    }
    for override in overrides:
        name, equals, text = override.partition("=")
        table, dot, key = name.strip().partition(".")
        if not (equals and dot and table and key):
            raise ConfigError(f"{override!r} is not TABLE.KEY=VALUE")
        keys = merged.setdefault(table, {})
        if isinstance(keys, dict):
            keys[key] = _parse_value(text)
    kinds = typing.get_type_hints(TrainConfig)
    unknown = [
        each for t, keys in merged.items() if t not in kinds for each in _unknown(t, keys, kinds)
    ]
    for table, kind in kinds.items():
        keys = merged.get(table, {})
        if not isinstance(keys, dict):
            raise ConfigError.of(table, "must be a table")
        known = {entry.name for entry in dataclasses.fields(kind)}
        unknown += [
            f"{table}.{key}{_aside(_meant(table, key, kinds))}" for key in keys if key not in known
        ]
    if unknown:
        raise ConfigError("unknown keys: " + ", ".join(sorted(unknown)))
    return TrainConfig(
        **{table: _build_table(table, kind, merged.get(table, {})) for table, kind in kinds.items()}
    )


def _meant(table: str, key: str, kinds: Mapping[str, type]) -> str:
    known = [entry.name for entry in dataclasses.fields(kinds[table])]
    near = did_you_mean(key, known) or _elsewhere(key)
    return near or f"; there are {', '.join(known)}"


def _unknown(table: str, keys: Any, kinds: Mapping[str, type]) -> list[str]:
    """What is said of a table that is none: of its keys, where these are known."""
    is_table, is_key = isinstance(keys, dict), any(k.endswith(f".{table}") for k in all_keys())
    near = "" if is_key else did_you_mean(table, kinds)
    if is_table and not near:
        inside = {key: _elsewhere(key) for key in keys}
        if any(inside.values()):
            return [f"{table}.{key}{_aside(meant)}" for key, meant in inside.items()]
    if is_key or not (is_table or near):
        near = _elsewhere(table)
    return [f"{table}{_aside(near or '; the tables are ' + ', '.join(kinds))}"]


def _elsewhere(key: str) -> str:
    """The key of that name, or of that meaning, in whichever table."""
    meant = meant_key(key)
    return f"; did you mean {meant}?" if meant else ""


def _aside(text: str) -> str:
    return text and f" ({text.removeprefix('; ')})"


def _parse_value(text: str) -> Any:
    text = text.strip()
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build_table(table: str, kind: type, keys: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    values = {key: _convert(f"{table}.{key}", value, hints[key]) for key, value in keys.items()}
    for entry in dataclasses.fields(kind):
        if entry.default is dataclasses.MISSING and entry.name not in values:
            raise ConfigError.of(f"{table}.{entry.name}", "is required")
    return kind(**values)


def _convert(key: str, value: Any, hint: Any) -> Any:
    """The value in the field's type; TOML's own types are strict but for whole floats."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            meant = did_you_mean(str(value), choices)
            problem = f"must be one of {', '.join(choices)}, not {toml_value(value):.60}{meant}"
            raise ConfigError.of(key, problem)
        return value
    if typing.get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ConfigError.of(key, f"must be a list of strings, not {toml_value(value):.60}")
        return tuple(items)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if hint is float and (is_whole or isinstance(value, float)):
        return float(value)
    if (hint is int and is_whole) or (hint in (bool, str) and isinstance(value, hint)):
        return value
    name = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[hint]
    raise ConfigError.of(key, f"must be {name}, not {toml_value(value):.60}")


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
    for table, kind in typing.get_type_hints(TrainConfig).items():
        summary = (kind.__doc__ or "").replace("``", "`").split("\n\n")
        lines += ["", *_comment(" ".join(part.replace("\n", " ") for part in summary))]
        lines.append(f"[{table}]")
        for entry in dataclasses.fields(kind):
            chosen = entry.metadata["chosen"]
            note = f" (left out: {chosen})" if chosen else ""
            lines += _comment(entry.metadata["help"] + note)
            is_required = entry.default is dataclasses.MISSING
            mark = "# " if entry.default is None else ""
            shown = entry.metadata["sample"] if mark or is_required else entry.default
            lines.append(f"{mark}{entry.name} = {toml_value(shown)}")
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), _COMMENT_COLUMNS)]
