"""The generated part of docs/security.md."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from checkout import ROOT
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from turret.v1 import adapters_pb2, inference_pb2

FILES = (inference_pb2.DESCRIPTOR, adapters_pb2.DESCRIPTOR)
_SIZED = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
# The pattern of an adapter's name defines its length.
_NAME, _NAME_CHARS = "{0,126}", 128
_LIMIT = re.compile(r"(?:at most|1 to|up to) (\d+)|(\d+) digits", re.IGNORECASE)


def comments() -> dict[str, str]:
    """``Message.field`` → the comment above it in the proto files, on one line."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "proto" / "turret" / "v1").glob("*.proto")):
        message, comment = "", ""
        for line in path.read_text().splitlines():
            text = line.strip()
            if text.startswith("//"):
                comment += " " + text.removeprefix("//").strip()
                continue
            if match := re.match(r"message (\w+) ", text):
                message = match[1]
            elif match := re.match(r"(?:optional |repeated )?[\w.<>, ]+ (\w+) = \d+;", text):
                found[f"{message}.{match[1]}"] = comment
            comment = ""
    return found


def sized_fields(message: Descriptor, seen: set[str]) -> Iterator[FieldDescriptor]:
    """The texts, bytes and lists of a message and of its submessages."""
    if message.full_name in seen or not message.full_name.startswith("turret."):
        return
    seen.add(message.full_name)
    for field in message.fields:
        if field.type in _SIZED or field.is_repeated:
            yield field
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            yield from sized_fields(field.message_type, seen)


def name_of(field: FieldDescriptor) -> str:
    """``Message.field``."""
    return ".".join(field.full_name.split(".")[-2:])


def number_in(comment: str) -> int | None:
    """The limit that a comment states; None if the model sets it."""
    if _NAME in comment:
        return _NAME_CHARS
    found = _LIMIT.search(comment)
    return int(found[1] or found[2]) if found else None


def render_limits() -> str:
    """The text, list and byte fields of all requests, one row per limit."""
    fields_of: dict[tuple[float, str], list[str]] = {}
    seen, comment_of = set[str](), comments()
    for method in (m for f in FILES for s in f.services_by_name.values() for m in s.methods):
        for field in sized_fields(method.input_type, seen):
            comment = comment_of[name_of(field)]
            number, is_context = number_in(comment), "the model's context" in comment
            assert number or is_context, f"the comment of {field.full_name} states no limit"
            unit = "entries" if field.is_repeated else "characters"
            unit = "MiB" if field.type == field.TYPE_BYTES else unit
            limit = (number, unit) if number else (math.inf, "what the model's context can hold")
            fields_of.setdefault(limit, []).append(f"`{name_of(field)}`")
    lines = ["| at most | fields |", "|---|---|"]
    for (number, unit), names in sorted(fields_of.items(), key=lambda row: (row[0][1], row[0][0])):
        most = unit if number == math.inf else f"{number} {unit}"
        lines.append(f"| {most} | {', '.join(names)} |")
    return "\n".join(lines)
