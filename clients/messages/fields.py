"""Plain values into the fields of messages, with complaints that name the argument."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor


def fill(
    message: Any, names: Iterable[str], values: Mapping[str, Any], *, within: str = ""
) -> None:
    """Set the named fields; protobuf's own errors do not say which field they mean.

    Args:
        message: What has the fields.
        names: Those to set, of which each that has no value is left alone.
        values: By the names of the fields.
        within: What complaints put in front of a field's name, such as ``messages[0].``.
    """
    for name in names:
        if name in values:
            called, value = f"{within}{name}", values[name]
            kind = message.DESCRIPTOR.fields_by_name[name].type
            # A bool is an int to Python and to protobuf, which takes either for the other.
            is_bool = kind == FieldDescriptor.TYPE_BOOL
            if isinstance(value, bool) and not is_bool:
                raise TypeError(f"{called}: not a bool, such as {value}")
            if is_bool and not isinstance(value, bool):
                raise TypeError(f"{called}: True or False, not {value!r}")
            if kind == FieldDescriptor.TYPE_STRING:
                check_text(called, value)
            _each(called, lambda value, name=name: setattr(message, name, value), value)


def check_text(name: str, value: object) -> None:
    """Refuse what is no text; bytes are none here, though protobuf takes them for it.

    Raises:
        TypeError: It is none; names the argument.
        ValueError: It holds half of a surrogate pair, as bytes that are not UTF-8 become.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}: a text, not {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: a text that is not UTF-8") from None


def extend_texts(name: str, field: Any, items: Iterable[Any]) -> None:
    """Add all of them to a repeated field; of one that does not fit, it alone is told."""
    for item in items:
        check_text(name, item)
        field.append(item)


def extend_ids(name: str, field: Any, items: Iterable[Any]) -> None:
    """As :func:`extend_texts`, of whole numbers, those of numpy and torch too."""
    ids = [as_whole(name, item) for item in items]
    try:
        field.extend(ids)
    except ValueError:
        for item in ids:
            _each(name, field.append, item)
        raise


def as_whole(name: str, item: Any) -> int:
    """The item as an int.

    Raises:
        TypeError: It is no whole number; names the argument.
    """
    if not isinstance(item, bool):
        try:
            return operator.index(item)
        except TypeError:
            pass
    raise TypeError(f"{name}: a whole number, not {item!r}")


def several(name: str, value: Any, wanted: str) -> Iterable[Any]:
    """The value if one can iterate over it and it is no text or mapping.

    Raises:
        TypeError: It is something else; names the argument and what is ``wanted``.
    """
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        return value
    raise TypeError(f"{name}: {wanted}, not {value!r}")


def as_json(name: str, value: object) -> str:
    """The value as JSON.

    Raises:
        TypeError, ValueError: It is none; names the argument.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _each(name: str, store: Callable[[Any], None], value: Any) -> None:
    """Call ``store(value)``, with the field's name in front of any complaint."""
    try:
        store(value)
    except (TypeError, ValueError, OverflowError) as error:
        said = str(error)
        if "cannot be interpreted as an integer" in said:
            said = f"a whole number, not {value!r}"
        elif said.startswith("must be real number"):
            said = f"a number, not {value!r}"
        elif isinstance(value, int) and (
            isinstance(error, OverflowError) or said.startswith("Value out of range")
        ):
            said = f"{value} is too large" if value > 0 else f"must not be negative, is {value}"
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {said}") from None
