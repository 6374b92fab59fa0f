"""Grammars, in llguidance's Lark, of answers that are calls of tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from turret.server.http.tools.calls import FORMS

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
# As between the tokens of any constrained JSON.
_BLANKS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}"}


def calls_grammar(form: str, tools: Mapping[str, Mapping[str, Any]], *, is_parallel: bool) -> str:
    """The grammar of an answer that is nothing but calls.

    Args:
        form: How the model writes calls: a key of ``FORMS``.
        tools: Those that may be called, with their arguments' JSON schemas.
        is_parallel: Whether there may be several calls.
    """
    how = FORMS[form]
    lines: list[str] = []
    for index, (name, parameters) in enumerate(tools.items()):
        schema = {**(parameters or _NO_ARGUMENTS), "x-guidance": _BLANKS}
        head = f'{{"name": {json.dumps(name)}, "{how.parameters}": '
        lines.append(f'call{index}: {json.dumps(head)} arguments{index} "}}"')
        lines.append(f"arguments{index}: %json {json.dumps(schema)}")
    calls = " | ".join(f"call{index}" for index in range(len(tools)))
    lines.append(f"call: {calls}")
    begin, end = json.dumps(f"{how.begin}\n"), json.dumps(f"\n{how.end}")
    if how.end:
        lines.append(f"wrapped: {begin} call {end}")
        start = 'wrapped ("\\n" wrapped)*' if is_parallel else "wrapped"
    elif how.is_list:
        more = ' (", " call)*' if is_parallel else ""
        start = f'{json.dumps(how.begin)} "[" call{more} "]"'
    else:
        start = 'call ("; " call)*' if is_parallel else "call"
    return "\n".join([f"start: {start}", *lines])
