"""Conversion of plain values to fields of messages; errors name the argument."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor

from turret.clients.words import Text, say

_WHOLE = {
    FieldDescriptor.CPPTYPE_INT32: range(-(2**31), 2**31),
    FieldDescriptor.CPPTYPE_INT64: range(-(2**63), 2**63),
    FieldDescriptor.CPPTYPE_UINT32: range(2**32),
    FieldDescriptor.CPPTYPE_UINT64: range(2**64),
}
_REAL = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)


class ArgumentError(Exception):
    """An argument that no request can carry; raised as one of the two classes below.

    Attributes:
        argument: The argument, or the part of it that is wrong, such as ``messages[0].role``.
        problem: The fault.
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


def fill(message: Any, values: Mapping[str, Any], *, within: str = "") -> None:
    """Set fields; protobuf's own errors do not say which field they mean.

    Args:
        message: The message that has the fields.
        values: The values by the names of the fields.
        within: The prefix of a field's name in errors, such as ``messages[0].``.

    Raises:
        ArgumentTypeError, ArgumentValueError: A value does not fit its field.
    """
    for name, value in values.items():
        field = message.DESCRIPTOR.fields_by_name[name]
        setattr(message, name, _fitting(f"{within}{name}", value, field))


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _fitting(name: str, value: Any, field: FieldDescriptor) -> Any:
    """The value in the form that a field of this type takes."""
    kind = field.cpp_type
    # Protobuf would accept 1 and 0 too.
    if kind == FieldDescriptor.CPPTYPE_BOOL and not isinstance(value, bool):
        raise ArgumentTypeError(name, say("NOT_TRUE_OR_FALSE", value=repr(value)))
    if kind == FieldDescriptor.CPPTYPE_STRING:
        check_text(name, value)
    elif field.enum_type is not None:
        return _enum_value(name, value, field.enum_type)
    elif kind in _WHOLE:
        return _within(name, as_whole(name, value), _WHOLE[kind])
    elif kind in _REAL:
        return as_real(name, value)
    return value


def _enum_value(name: str, value: Any, enum: EnumDescriptor) -> int:
    """The number of a name, in any case; the first name means unspecified, so it is skipped."""
    numbers = {each.name.lower(): each.number for each in enum.values[1:]}
    if isinstance(value, str) and value.lower() in numbers:
        return numbers[value.lower()]
    kind = ArgumentValueError if isinstance(value, str) else ArgumentTypeError
    raise kind(name, say("NOT_ONE_OF", choices=", ".join(numbers), value=value))


def _within(name: str, number: int, allowed: range) -> int:
    if number in allowed:
        return number
    limits = {"least": allowed.start, "most": allowed.stop - 1}
    raise ArgumentValueError(name, say("NOT_IN_RANGE", value=number, **limits))


def as_real(name: str, value: Any) -> float:
    """The value as a float, including numpy and torch numbers.

    Raises:
        ArgumentTypeError, ArgumentValueError: The value is not a number, or is too large.
    """
    # In Python, a bool is a number, and a text can be converted to one.
    if isinstance(value, str | bytes | bool):
        raise ArgumentTypeError(name, say("NOT_A_NUMBER", value=repr(value)))
    try:
        return float(value)
    except OverflowError:
        raise ArgumentValueError(name, say("TOO_LARGE_FOR_A_FLOAT", value=value)) from None
    except (TypeError, ValueError):
        raise ArgumentTypeError(name, say("NOT_A_NUMBER", value=repr(value))) from None


def check_text(name: str, value: object) -> None:
    """Reject anything but text. Protobuf would accept bytes.

    Raises:
        TypeError: The value is not text; names the argument.
        ValueError: The text contains half of a surrogate pair, as invalid UTF-8 does.
    """
    if not isinstance(value, str):
        raise ArgumentTypeError(name, say("NOT_A_STRING", value=repr(value)))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ArgumentValueError(name, say("NOT_UTF8")) from None


def extend_texts(name: str, field: Any, items: Iterable[Any]) -> None:
    """Add all texts to a repeated field; an error concerns only the one that does not fit."""
    for item in items:
        check_text(name, item)
        field.append(item)


def extend_ids(name: str, field: Any, items: Iterable[Any]) -> None:
    """Add token ids, also those of numpy and torch, to a repeated field."""
    ids = [as_whole(name, item) for item in items]
    try:
        field.extend(ids)
    except ValueError:
        allowed = _WHOLE[FieldDescriptor.CPPTYPE_UINT32]
        for number in ids:
            _within(name, number, allowed)
        raise


def as_whole(name: str, item: Any) -> int:
    """The item as an int.

    Raises:
        TypeError: The value is not a whole number; names the argument.
    """
    if not isinstance(item, bool):
        try:
            return operator.index(item)
        except TypeError:
            pass
    raise ArgumentTypeError(name, say("NOT_A_WHOLE_NUMBER", value=repr(item)))


def several(name: str, value: Any, wanted: str) -> Iterable[Any]:
    """The value, if it is an iterable other than a string or mapping.

    Raises:
        TypeError: The value has another type; names the argument and the ``wanted`` type.
    """
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        return value
    raise not_of_type(name, wanted, value)


def not_of_type(name: str, wanted: str, value: object) -> ArgumentTypeError:
    """The error for an argument that is not ``wanted``, which describes its type."""
    return ArgumentTypeError(name, say("NOT_OF_TYPE", wanted=wanted, value=repr(value)))


def as_json(name: str, value: object) -> str:
    """The value as JSON.

    Raises:
        TypeError, ValueError: The value cannot be JSON; names the argument.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        kind = ArgumentTypeError if isinstance(error, TypeError) else ArgumentValueError
        raise kind(name, say("NOT_JSON", problem=error)) from None


# Translation of the request fields in a server's errors to the arguments that set them.

# Messages within a request; each of their fields is a separate argument.
_GROUPS = ("sampling.", "stop.", "options.", "chat.", "header.")
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
