"""docs/security.md, the table of limits and the proto files are consistent."""

from __future__ import annotations

import re
from collections.abc import Iterator

from checkout import ROOT
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from pages.security_page import PAGE, rendered

from turret.server.adapters.checkpoint import adapter_root
from turret.server.api import limits
from turret.server.api.limits import LIMITS
from turret.server.api.uploads import MAX_CHUNK_BYTES, UPLOAD_FILES
from turret.server.api.violations import MAX_VIOLATIONS
from turret.v1 import adapters_pb2, inference_pb2

_SIZED = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
# The pattern of an adapter's name defines its length.
_NAME = "{0,126}"


def _sized_fields(message: Descriptor, seen: set[str]) -> Iterator[FieldDescriptor]:
    """The texts, bytes and lists of a message and of its submessages."""
    if message.full_name in seen or not message.full_name.startswith("turret."):
        return
    seen.add(message.full_name)
    for field in message.fields:
        if field.type in _SIZED or field.is_repeated:
            yield field
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            yield from _sized_fields(field.message_type, seen)


def _request_fields() -> set[str]:
    seen: set[str] = set()
    fields = [
        field
        for file in (inference_pb2.DESCRIPTOR, adapters_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
        for field in _sized_fields(method.input_type, seen)
    ]
    return {".".join(field.full_name.split(".")[-2:]) for field in fields}


def _comments() -> dict[str, str]:
    """``Message.field`` → the comment above it, on one line."""
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


def test_the_table_is_that_of_the_code() -> None:
    page = PAGE.read_text()
    assert page == rendered(page), "run `make pages`"


def test_every_text_and_list_of_a_request_has_one_limit() -> None:
    listed = [limit.field for limit in LIMITS]
    assert len(set(listed)) == len(listed)
    assert set(listed) == _request_fields()


def test_the_comments_in_the_proto_files_give_the_limits() -> None:
    comments = _comments()
    for limit in LIMITS:
        comment = comments[limit.field]
        said = _NAME if _NAME in comment else str(limit.number) if limit.number else "context"
        assert re.search(rf"(?<!\d){re.escape(said)}(?!\d)", comment), limit


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", PAGE.read_text()))
    assert len(named) > 40
    for path, test in named:
        assert (ROOT / path).exists(), path
        if test:
            assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


def test_limits_that_are_written_twice_are_equal() -> None:
    assert adapter_root.MAX_PATH_CHARS == limits.MAX_PATH_CHARS
    assert len(UPLOAD_FILES) == limits.MAX_UPLOAD_FILES
    assert MAX_CHUNK_BYTES == 1 << 20
    assert f"lists at most {MAX_VIOLATIONS} violations" in PAGE.read_text()
    assert all((ROOT / limit.checked_in).is_file() for limit in LIMITS)
