"""Converts plain values to fields of messages; errors name the argument."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor

from turret.clients.words import Text, say


class ArgumentError(Exception):
    """An argument that fits no request; raised as one of the two classes below.

    Attributes:
        argument: The argument, or the part of it that is wrong, such as ``messages[0].role``.
        problem: What is wrong with it.
    """

    def __init__(self, argument: str, problem: Text) -> None:
        super().__init__(argument, problem)
        self.argument = argument
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.argument}: {self.problem}"


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument of the wrong type."""


class ArgumentValueError(ArgumentError, ValueError):
    """An argument whose value does not fit."""


_NUMBERS = dict.fromkeys(
    (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT), "a number"
)


@contextlib.contextmanager
def named(argument: str, value: object, wanted: str = "") -> Iterator[None]:
    """Add the name of the argument to protobuf's errors in the block.

    Args:
        argument: The name of the argument.
        value: Its value.
        wanted: The type that it must have; empty if protobuf's own words describe it.

    Raises:
        ArgumentTypeError, ArgumentValueError: The value does not fit its field.
    """
    try:
        yield
    except ArgumentError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        if wanted and isinstance(error, TypeError):
            raise not_of_type(argument, wanted, value) from None
        text = say("UNFIT", value=f"{value!r:.60}", problem=error)
        if isinstance(error, TypeError):
            raise ArgumentTypeError(argument, text) from None
        if isinstance(value, int | float):
            text = say("OUT_OF_RANGE", value=value)
        raise ArgumentValueError(argument, text) from None


def fill(message: Any, values: Mapping[str, Any], *, within: str = "") -> None:
    """Set fields of a message.

    Args:
        message: The message that has the fields.
        values: The values by the names of the fields.
        within: The prefix of a field's name in errors, such as ``messages[0].``.

    Raises:
        ArgumentTypeError, ArgumentValueError: A value does not fit its field.
    """
    for name, value in values.items():
        argument = f"{within}{name}"
        field = message.DESCRIPTOR.fields_by_name[name]
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            check_text(argument, value)
        # Protobuf would accept 1 and 0 too.
        elif field.cpp_type == FieldDescriptor.CPPTYPE_BOOL and not isinstance(value, bool):
            raise ArgumentTypeError(argument, say("NOT_TRUE_OR_FALSE", value=repr(value)))
        elif field.enum_type is not None:
            value = _enum_value(argument, value, field.enum_type)
        with named(argument, value, _NUMBERS.get(field.cpp_type, "an integer")):
            setattr(message, name, value)


def extend(
    name: str, field: Any, items: Any, wanted: str = "a list", *, is_text: bool = False
) -> None:
    """Add items to a repeated field; they may be numpy or torch numbers.

    Args:
        name: The name of the argument in errors.
        field: The field.
        items: The items.
        wanted: The type of the argument, for the error.
        is_text: Whether every item must be a string.

    Raises:
        ArgumentTypeError, ArgumentValueError: The value is not a list, or an item does not fit.
    """
    with named(name, items):
        found = list(several(name, items, wanted))
        for index, each in enumerate(found):
            if is_text or isinstance(each, str | bytes):
                check_text(f"{name}[{index}]", each)
        field.extend(found)


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _enum_value(name: str, value: Any, enum: EnumDescriptor) -> int:
    """The number of an enum's name, in any case. The first name, for unspecified, is rejected."""
    numbers = {each.name.lower(): each.number for each in enum.values[1:]}
    if isinstance(value, str) and value.lower() in numbers:
        return numbers[value.lower()]
    kind = ArgumentValueError if isinstance(value, str) else ArgumentTypeError
    raise kind(name, say("NOT_ONE_OF", choices=", ".join(numbers), value=value))


def check_text(name: str, value: object) -> None:
    """Reject anything but text. Protobuf would accept bytes.

    Raises:
        TypeError: The value is not text. The error names the argument.
        ValueError: The text contains half of a surrogate pair, as text decoded from invalid UTF-8
            may.
    """
    if not isinstance(value, str):
        raise ArgumentTypeError(name, say("NOT_A_STRING", value=repr(value)))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ArgumentValueError(name, say("NOT_UTF8")) from None


def several(name: str, value: Any, wanted: str) -> Iterable[Any]:
    """The value, if it is an iterable other than a string or mapping.

    Raises:
        TypeError: The value has another type. The error names the argument and the ``wanted`` type.
    """
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        return value
    raise not_of_type(name, wanted, value)


def not_of_type(name: str, wanted: str, value: object) -> ArgumentTypeError:
    """The error for an argument that is not ``wanted``, which describes its type."""
    return ArgumentTypeError(name, say("WRONG_TYPE", expected=wanted, value=repr(value)))


def as_json(name: str, value: object) -> str:
    """The value as JSON.

    Raises:
        TypeError, ValueError: The value cannot be JSON. The error names the argument.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        kind = ArgumentTypeError if isinstance(error, TypeError) else ArgumentValueError
        raise kind(name, say("NOT_JSON", problem=error)) from None


# Translation of the request fields in a server's errors to the arguments that set them.

# Messages within a request; each of their fields is a separate argument.
_GROUPS = ("sampling.", "stop.", "options.", "chat.", "header.", "config.")
_ARGUMENTS = {
    "stop.stop_strings": "stop",
    "token_ids.ids": "prompt",
    "input": "prompt",
    "choice.texts": "choice",
    # Only UnloadAdapterRequest has this field.
    "timeout": "drain_seconds",
    # The client fills in an upload's header from the files themselves.
    "header.files": "directory",
}
# Matches ``inputs[N]`` and the field of its content, up to an index or subfield.
_WITHIN = re.compile(r"(inputs\[\d+\])\.(?:token_ids\.ids|chat\.messages)")


def argument(field: str) -> str:
    """The argument, or its part, that sets a field: ``temperature`` for ``sampling.temperature``.

    Fields that have their argument's name, and those that no argument sets, stay as they are.
    """
    if found := _WITHIN.match(field):
        return found[1] + field[found.end() :]
    for path, name in _ARGUMENTS.items():
        if field == path or field.startswith((f"{path}[", f"{path}.")):
            return name + field[len(path) :]
    group = next((group for group in _GROUPS if field.startswith(group)), "")
    return field[len(group) :]
