"""Settings from a TOML file, environment variables and flags, and the types of their values."""

from __future__ import annotations

import ipaddress
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticKnownError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from turret.server.basics.names import closest
from turret.server.words import Text, say

# Sizes in bytes, as people write them.


MIB = 1 << 20
GIB = 1 << 30

_BYTE_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 1 << 40,
}
_SHOWN_UNITS = (
    *(("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", 1 << 10)),
    *(("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)),
)
_BYTE_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_byte_size(text: str) -> int:
    """``512MiB``, ``2GB``, ``1.5GiB`` or a plain count, as bytes.

    Raises:
        ValueError: The text is not a number with one of the units B, kB, MB, GB, TB, KiB, MiB, GiB,
            TiB.
    """
    match = _BYTE_SIZE.fullmatch(text.strip())
    unit = match[2].upper() if match else ""
    if match is None or unit not in _BYTE_UNITS:
        raise ValueError(f"{text!r} is not a byte size such as 512MiB, 2GB or 1048576")
    return (
        int(float(match[1]) * _BYTE_UNITS[unit])
        if "." in match[1]
        else (int(match[1]) * _BYTE_UNITS[unit])
    )


def format_byte_size(count: int) -> str:
    """The shortest exact form, the binary one on a tie: 268435456 → ``256MiB``, 2·10⁹ → ``2GB``."""
    exact = [
        f"{count // size}{unit}"
        for unit, size in _SHOWN_UNITS
        if count >= size and count % size == 0
    ]
    return min((*exact, str(count)), key=len)


def parse_toml(data: bytes) -> dict[str, Any]:
    """The tables of a file. A byte-order mark, which Windows editors write, is ignored.

    Raises:
        ValueError: The file is not UTF-8 or not TOML; the error names the place.
    """
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(say("NOT_TOML", why=str(error))) from None


def toml_value(value: object) -> str:
    """A value in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON strings are valid TOML, except for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(each)}" for key, each in value.items()) + "}"
    return str(value)


# Addresses on which a server listens.


def split_address(address: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[V6]:PORT`` as (host without brackets, port).

    Raises:
        ValueError: The port is missing or outside 0..65535, or an IPv6 host has no brackets.
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    is_port = port.isascii() and port.isdigit() and int(port) <= 65535
    if not colon or not host or not is_port or (":" in host and not bracketed):
        raise ValueError(say("NOT_AN_ADDRESS", value=address))
    return (host[1:-1] if bracketed else host), int(port)


def is_local_address(address: str) -> bool:
    """Whether only this machine can connect: loopback or a unix socket."""
    if address.startswith("unix:"):
        return True
    host, _ = split_address(address)
    return host == "localhost" or (is_ip_address(host) and ipaddress.ip_address(host).is_loopback)


def is_ip_address(host: str) -> bool:
    """Whether a host is an IP address instead of a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


# The check of the settings from all sources.
#
# The model is a pydantic dataclass with a pydantic dataclass for each table. Errors are collected:
# all invalid settings are reported at once, each with a reason.


T = TypeVar("T")
TABLE = ConfigDict(extra="forbid")
"""How the dataclass of a table is configured."""
_MOST_SHOWN = 60
_SECONDS = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|min|m|h)")
_SECONDS_OF = {"ms": 0.001, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


class Violation(NamedTuple):
    """The fault in one setting.

    Attributes:
        field: ``table.key``, or a variable if no such key exists.
        text: The fault.
    """

    field: str
    text: Text


class SettingsError(ValueError):
    """Invalid settings.

    Attributes:
        violations: The faults of all invalid settings.
    """

    def __init__(self, *violations: Violation) -> None:
        super().__init__("\n".join(f"{field}: {text}" for field, text in violations))
        self.violations = violations


class Checked:
    """A table whose settings are also checked in combination."""

    __slots__ = ()

    def faults(self) -> Iterator[Violation]:
        """The faults of valid settings that do not fit each other."""
        yield from ()

    def __post_init__(self) -> None:
        if found := list(self.faults()):
            raise SettingsError(*found)


class Layer(NamedTuple):
    """The settings from one source.

    Attributes:
        origin: The file or the environment variable; empty for a flag.
        values: Table → key → value, as written.
    """

    origin: str
    values: Mapping[str, Any]


class _Layers(BaseSettings, Generic[T]):
    """Layers of settings. The first one that has a value wins."""

    config: T

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        layers = init_settings()["layers"]
        return tuple(InitSettingsSource(settings_cls, {"config": each}) for each in layers)


def load(model: type[T], layers: Iterable[Layer]) -> T:
    """The combined settings of all layers.

    Args:
        model: The dataclass of all tables.
        layers: The layers; the first one that has a value wins.

    Raises:
        SettingsError: Keys are unknown, or values are invalid by themselves or in combination.
    """
    given: dict[str, Any] = {"layers": [each.values for each in layers] or [{}]}
    try:
        return _Layers[model](**given).config
    except ValidationError as error:
        raise SettingsError(*_violations(model, error)) from None


def fields_of(table: type) -> dict[str, FieldInfo]:
    """The keys of a table, or the tables of a model."""
    assert is_pydantic_dataclass(table)
    return table.__pydantic_fields__


def tables_of(model: type) -> dict[str, type]:
    """The dataclass of each table."""
    return typing.get_type_hints(model)


def all_keys(model: type) -> list[str]:
    """Every ``table.key``."""
    return [f"{table}.{key}" for table, kind in tables_of(model).items() for key in fields_of(kind)]


def closest_key(model: type, name: str) -> str | None:
    """The known ``table.key`` that is closest to an unknown one."""
    table, _, last = name.rpartition(".")
    keys = all_keys(model)
    own = [key for key in keys if key.startswith(f"{table}.")] or keys
    for among in (own, keys):
        names = {key.partition(".")[2]: key for key in reversed(among)}
        plain = last.replace("-", "_")
        if meant := plain if plain in names else closest(plain, names):
            return names[meant]
    return None


def parts_of(annotation: Any) -> set[Any]:
    """The types in a union, a tuple or an annotated type."""
    inside = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal or not inside:
        return {annotation, *inside}
    return {annotation}.union(*map(parts_of, inside))


def _parts(info: FieldInfo) -> set[Any]:
    return parts_of(info.annotation) | set(info.metadata)


def is_bytes(info: FieldInfo) -> bool:
    """Whether a setting is a size in memory."""
    return _AS_BYTES in _parts(info)


def is_listed(info: FieldInfo) -> bool:
    """Whether a setting has several values."""
    return any(typing.get_origin(part) is tuple for part in _parts(info))


def choices_of(info: FieldInfo) -> tuple[str, ...]:
    """The allowed values of a setting, if it has a fixed list."""
    parts = _parts(info)
    return next((typing.get_args(p) for p in parts if typing.get_origin(p) is Literal), ())


def text_of(error: Exception) -> Text:
    """The message of an error."""
    said = error.args[0] if error.args else ""
    return said if isinstance(said, Text) else say("INVALID", why=str(error))


def _violations(model: type, error: ValidationError) -> Iterator[Violation]:
    for each in error.errors(include_url=False):
        cause = each.get("ctx", {}).get("error")
        if isinstance(cause, SettingsError):
            yield from cause.violations
            continue
        # Omit indices, which mean little for a list from a variable or a flag.
        place = [str(part) for part in each["loc"][1:] if not isinstance(part, int)]
        yield Violation(".".join(place[:2]), _text(model, place, each))


def _text(model: type, place: Sequence[str], error: ErrorDetails) -> Text:
    name, value, limits = ".".join(place), error["input"], error.get("ctx", {})
    shown = toml_value(value)[:_MOST_SHOWN]
    table = tables_of(model).get(place[0]) if place else None
    info = fields_of(table).get(place[1]) if table and len(place) > 1 else None
    match error["type"]:
        case "unexpected_keyword_argument":
            near = closest(name, tables_of(model)) if len(place) == 1 else None
            return say("UNKNOWN_FIELD", closest=near or closest_key(model, name))
        case "missing" | "missing_keyword_only_argument":
            return say("REQUIRED")
        case "dataclass_type":
            return say("NOT_A_TABLE", value=shown)
        case "greater_than_equal":
            return say("TOO_SMALL", least=show(info, int(limits["ge"])), value=value)
        case "greater_than":
            return say("NOT_ABOVE", bound=f"{limits['gt']:g}", value=value)
        case "less_than":
            return say("NOT_BELOW", bound=f"{limits['lt']:g}", value=value)
        case "literal_error":
            choices = choices_of(info) if info else ()
            near = closest(str(value), choices)
            return say("NOT_ONE_OF", choices=", ".join(choices), value=value, closest=near)
        case "too_short" | "string_too_short":
            return say("EMPTY")
        case "value_error" | "assertion_error":
            return text_of(limits["error"])
        case "float_type" | "float_parsing" if info and _AS_SECONDS in _parts(info):
            return say("NOT_A_DURATION", value=shown)
    for kind, found in _KINDS:
        if error["type"].startswith(kind):
            return found(shown)
    return say("INVALID", why=error["msg"])


_KINDS = (
    ("int", lambda value: say("NOT_A_WHOLE_NUMBER", value=value)),
    ("float", lambda value: say("NOT_A_NUMBER", value=value)),
    ("finite", lambda value: say("NOT_A_NUMBER", value=value)),
    ("bool", lambda value: say("NOT_TRUE_OR_FALSE", value=value)),
    ("tuple", lambda value: say("NOT_A_LIST", value=value)),
    ("string", lambda value: say("NOT_A_STRING", value=value)),
    ("path", lambda value: say("NOT_A_STRING", value=value)),
)


class Typed(str):
    """A value from a flag or an environment variable, where numbers and switches are text."""


def _exact(kind: Literal["int_type", "float_type", "bool_type"]) -> BeforeValidator:
    """Reject values of other types. pydantic would convert true to 1 and "3" to 3."""

    def check(value: Any) -> Any:
        is_switch = isinstance(value, bool)
        if not isinstance(value, Typed) and (
            isinstance(value, str) or is_switch != (kind == "bool_type")
        ):
            raise PydanticKnownError(kind)
        return value

    return BeforeValidator(check)


def _bytes(value: Any) -> Any:
    try:
        return parse_byte_size(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(say("NOT_A_SIZE", value=value)) from None


def _seconds(value: Any) -> Any:
    found = _SECONDS.fullmatch(value.strip()) if isinstance(value, str) else None
    return float(found[1]) * _SECONDS_OF[found[2]] if found else value


def _not_empty(value: Any) -> Any:
    if value == "":
        # Reject empty text, as from an unset shell variable: as a path, it would mean the current
        # directory.
        raise ValueError(say("EMPTY"))
    return value


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Switch = Annotated[bool, _exact("bool_type")]
"""True or false."""
Whole = Annotated[int, _exact("int_type")]
"""A whole number."""
Number = Annotated[float, _exact("float_type")]
"""A number."""
# This validator and ``_AS_SECONDS`` also mark a setting's type, for its help and its messages.
_AS_BYTES = BeforeValidator(_bytes)
Bytes = Annotated[Whole, _AS_BYTES]
"""A size in memory, as ``1048576``, ``512MiB`` or ``2GB``."""
_AS_SECONDS = BeforeValidator(_seconds)
Seconds = Annotated[Number, _AS_SECONDS]
"""A duration, as ``2.5``, ``30s``, ``5m`` or ``200ms``."""
Name = Annotated[str, Field(min_length=1)]
"""A text that is not empty."""
Place = Annotated[Path, BeforeValidator(_not_empty)]
"""A path; in a file, relative to the file."""
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""Several texts: a list, or one text with commas."""


def show(info: FieldInfo | None, value: Any) -> str:
    """A value in the form in which people write it."""
    if value is None:
        return "-" if info is None or info.default is None else "none"
    if info is not None and is_bytes(info):
        return format_byte_size(int(value))
    if isinstance(value, tuple):
        return " ".join("=".join(v) if isinstance(v, tuple) else v for v in value) or "-"
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_optional(info: FieldInfo) -> bool:
    """Whether None is allowed, which is written ``none``."""
    return types.NoneType in _parts(info)


def setting(default: Any, help_text: str, *, shown: str = "", **rules: Any) -> Any:
    """A field of a table.

    Args:
        default: The default value; ``...`` for none.
        help_text: The help text.
        shown: The placeholder for the value in the help.
        rules: Limits, in the form of pydantic's ``Field``.
    """
    extra: Any = {"shown": shown} if shown else None
    return Field(default=default, description=help_text, json_schema_extra=extra, **rules)


def is_path(info: FieldInfo) -> bool:
    """Whether a setting is a path."""
    return Path in _parts(info)


def is_switch(info: FieldInfo) -> bool:
    """Whether a setting is on or off."""
    return bool in _parts(info)


def shown_of(info: FieldInfo) -> str:
    """The placeholder for the value in the help."""
    extra = info.json_schema_extra
    if isinstance(extra, dict) and "shown" in extra:
        return str(extra["shown"])
    if choices := choices_of(info):
        return f"{{{','.join(choices)}}}"
    parts = _parts(info)
    if _AS_SECONDS in parts or _AS_BYTES in parts:
        return "SECONDS" if _AS_SECONDS in parts else "SIZE"
    return "PATH" if Path in parts else "N" if {int, float} & parts else "TEXT"
