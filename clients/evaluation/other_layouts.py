"""What the keys of other tools' examples are called here, and the command that renames them.

They are explained and not read: which text of several is the prompt, and in which words it is put,
is what an adapter learns, and should be seen by who trains it.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

_CHATS = ("conversations", "conversation", "dialog", "dialogue")
_PROMPTS = ("instruction", "question", "query", "input", "problem")
_ANSWERS = ("response", "answer", "output", "target", "solution")
# Of texts with a label, where ``text`` is no plain text to learn.
_LABELLED = ("text", "sentence")
_ROLES = {"human": "user", "gpt": "assistant"}
_TURNS = (
    '[.{key}[] | {{role: (.role // .from | {{human: "user", gpt: "assistant"}}[.] // .),'
    " content: (.content // .value)}}]"
)


def renamed(row: Mapping[str, Any], path: Path) -> str:
    """What each key of a line of another layout has to be called; "" where none is known.

    Args:
        row: The line, which is of no shape that is read.
        path: Of its file.
    """
    if {"answer", "reference", "mix"} <= row.keys():
        return "is what `turret eval --answers` wrote, and not the test set that was judged"
    if "messages" in row:
        return ""
    chat = next((key for key in _CHATS if key in row), None)
    if chat is not None:
        turns = row[chat] if isinstance(row[chat], list) else []
        first = turns[0] if turns and isinstance(turns[0], dict) else {}
        inside = ", from role and value content, human user and gpt assistant"
        said = f"holds {chat}, which is called messages here{inside if 'from' in first else ''}"
        return said + _jq(f"{{messages: {_TURNS.format(key=chat)}}}", path)
    prompt, answer = _asked(row), _answered(row)
    pairs = [(key, name) for key, name in ((prompt, "prompt"), (answer, "completion"))]
    if prompt is None or answer is None or all(key == name for key, name in pairs):
        return ""
    (key, name), *others = [(key, name) for key, name in pairs if key != name]
    what = f"{key} is called {name} here{''.join(f', and {k} {n}' for k, n in others)}"
    source = f".{prompt}"
    if prompt == "instruction" and "input" in row:
        what += ", and input stands in the prompt, below the instruction"
        source = '([.instruction, .input // ""] | map(select(. != "")) | join("\\n\\n"))'
    value = f".{answer}" if isinstance(row[answer], str) else f"(.{answer} | tostring)"
    return f"{what}{_jq(f'{{prompt: {source}, completion: {value}}}', path)}"


def near(key: str, names: Collection[str]) -> str:
    """The end of a sentence about a key that is none, where it is close to one of these."""
    close = difflib.get_close_matches(key.lower(), sorted(names), 1, 0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""


def without(kept: Collection[str], path: Path) -> str:
    """The end of a sentence about keys that are not read: what leaves these alone."""
    keys = ", ".join(sorted(kept))
    return f"; `jq -c '{{{keys}}}' {shlex.quote(str(path))} >NEW.jsonl` leaves it out"


def _asked(row: Mapping[str, Any]) -> str | None:
    """The key of what is asked."""
    is_labelled = "label" in row and "completion" not in row
    keys = ("prompt", *_PROMPTS, *(_LABELLED if is_labelled else ()))
    return next((key for key in keys if key in row), None)


def _answered(row: Mapping[str, Any]) -> str | None:
    """The key of what is answered."""
    return next((key for key in ("completion", *_ANSWERS, "label") if key in row), None)


def turn_meant(keys: Collection[str], path: Path) -> str:
    """The end of a sentence about a message with these keys; "" where they are of no layout."""
    if not {"from", "value"} <= set(keys):
        return ""
    return f"; from is called role here, and value content{_messages(path)}"


def role_meant(role: object, path: Path) -> str:
    """The end of a sentence about a role that other tools have; "" of any other."""
    meant = _ROLES.get(role) if isinstance(role, str) else None
    return f", which is called {meant} here{_messages(path)}" if meant else ""


def turns_meant(value: object, path: Path) -> str:
    """The end of a sentence about a prompt or a completion that is no text, where it is turns."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return ""
    return f"; turns stand in messages{_jq('{messages: (.prompt + .completion)}', path)}"


def _messages(path: Path) -> str:
    return _jq(f"{{messages: {_TURNS.format(key='messages')}}}", path)


def _jq(program: str, path: Path) -> str:
    return f"; `jq -c '{program}' {shlex.quote(str(path))} >NEW.jsonl` writes such lines"
