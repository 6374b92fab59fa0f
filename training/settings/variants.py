"""The runs of a sweep: one for each combination of the values of ``--set``."""

from __future__ import annotations

import hashlib
import itertools
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from turret.server.basics.settings import Violation, fields_of, is_listed, tables_of, toml_value
from turret.training.settings import TrainConfig, parse_value, read_config
from turret.training.words import ConfigFileError, say

_LISTED = {
    f"{table}.{key}"
    for table, kind in tables_of(TrainConfig).items()
    for key, info in fields_of(kind).items()
    if is_listed(info)
}
# A variant's name is that of its directory, and the default name of the adapter in it.
_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_MAX_NAME_CHARS = 40


@dataclass(frozen=True, slots=True)
class Variant:
    """One run of a sweep.

    Attributes:
        settings: The settings that vary, with this run's values; by the names of their flags.
        config: The config of the run. Its output is a directory below that of the sweep.
    """

    settings: Mapping[str, Any]
    config: TrainConfig

    @property
    def title(self) -> str:
        """The settings for people: ``rank 4, learning rate 0.001``."""
        return ", ".join(f"{shown_key(key)} {shown(v)}" for key, v in self.settings.items())


def shown_key(key: str) -> str:
    """The name of a setting for people."""
    return key.replace("_", " ")


def shown(value: Any) -> str:
    """The value of a setting for people, and in names of directories."""
    if isinstance(value, tuple):
        return "-".join(value)
    return value if isinstance(value, str) else toml_value(value)


def varies(override: str) -> bool:
    """Whether an override has a list of values, one for each run."""
    return _values(override) is not None


def read_variants(
    path: Path, overrides: Iterable[str], flags: Mapping[str, Any] | None = None
) -> list[Variant]:
    """The variants of a config; see ``read_config``.

    Args:
        path: The file.
        overrides: ``TABLE.KEY=VALUE``, or a list of values for a setting that varies.
        flags: Table → key → value; these win over the file and the overrides.

    Raises:
        ConfigFileError: A config is invalid, or the output varies.
    """
    keys: dict[str, None] = {}
    choices: list[list[str]] = []
    for override in overrides:
        values, key = _values(override), _key(override)
        if values is not None:
            keys[key] = None
        choices.append([override] if values is None else [f"{key}={toml_value(v)}" for v in values])
    if "run.output" in keys:
        raise ConfigFileError(Violation("run.output", say("ONE_VALUE_ONLY")))
    variants: dict[str, Variant] = {}
    for chosen in itertools.product(*choices):
        config = read_config(path, chosen, flags)
        settings = {}
        for key in keys:
            table, _, name = key.partition(".")
            settings[table if name == "name" else name] = getattr(getattr(config, table), name)
        name = "-".join(f"{key}-{_in_name(shown(value))}" for key, value in settings.items())
        run = replace(config.run, output=str(Path(config.run.output) / name))
        variants.setdefault(name, Variant(settings, replace(config, run=run)))
    return list(variants.values())


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _values(override: str) -> list[Any] | None:
    """The values in ``KEY=a,b,c`` or ``KEY=[a, b, c]``; None if the override is one value.

    A setting that is itself a list varies only with a list of lists.
    """
    key, text = _key(override), override.partition("=")[2]
    is_list = key in _LISTED
    try:
        found = tomllib.loads(f"value = [{text}]")["value"]
    except tomllib.TOMLDecodeError:
        found = [text] if is_list else [parse_value(part) for part in text.split(",")]
    if len(found) > 1:
        return found
    inner = found[0] if found else None
    if isinstance(inner, list) and (not is_list or any(isinstance(v, list) for v in inner)):
        return inner or None
    return None


def _in_name(text: str) -> str:
    """A text that no two values share, without characters that a name may not have."""
    plain = _NO_NAME.sub("-", text)[:_MAX_NAME_CHARS]
    if plain == text:
        return text
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
