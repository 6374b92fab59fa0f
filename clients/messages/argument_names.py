"""The fields of requests that a server names, as the arguments that set them."""

from __future__ import annotations

import re

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
