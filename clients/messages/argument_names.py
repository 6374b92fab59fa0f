"""The fields of requests that a server names, as the arguments that set them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

# Messages within a request whose fields are arguments of their own.
_GROUPS = ("sampling.", "stop.", "options.", "chat.", "header.")
_ARGUMENTS = {
    "stop.stop_strings": "stop",
    "token_ids.ids": "prompt",
    "input": "prompt",
    "choice.texts": "choice",
    # Of UnloadAdapterRequest, which alone has one.
    "timeout": "drain_seconds",
    # What an upload says of its files is read from them.
    "header.files": "directory",
}
# As a description mentions another field than its own.
_MENTIONED = re.compile(r"(?<![\w./])(?:sampling|stop|options)\.[a-z_]+")
# A prompt among several, and what in it; the rest of a path is in brackets or after a dot.
_WITHIN = re.compile(r"(inputs\[\d+\])\.(?:token_ids\.ids|chat\.messages)")


def argument(field: str) -> str:
    """The argument that sets a field, and what in it: ``temperature`` of ``sampling.temperature``.

    Fields that have their argument's name, and those that no argument sets, stay as they are.
    """
    if found := _WITHIN.match(field):
        return found[1] + field[found.end() :]
    for path, name in _ARGUMENTS.items():
        if field == path or field.startswith((f"{path}[", f"{path}.")):
            return name + field[len(path) :]
    group = next((group for group in _GROUPS if field.startswith(group)), "")
    return field[len(group) :]


def in_arguments(text: str, fields: Iterable[str]) -> str:
    """What a server says of these fields, in the names of their arguments."""
    return _MENTIONED.sub(lambda found: argument(found[0]), renamed(text, fields, argument))


def renamed(text: str, fields: Iterable[str], name_of: Callable[[str], str]) -> str:
    """The text with other names where it says of one of these fields what is wrong with it."""
    names = {field: name_of(field) for field in fields}
    changed = [field for field, name in names.items() if field != name]
    if not changed:
        return text
    any_field = "|".join(map(re.escape, sorted(changed, key=len, reverse=True)))
    return re.sub(rf"(?<![\w.\]])({any_field})(?=: )", lambda found: names[found[1]], text)
