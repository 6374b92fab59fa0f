"""The largest messages for every field of every endpoint, over both protocols.

The fields are read from the models of the HTTP routes and the descriptors of the protos, so new
fields are included automatically.
"""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fuzz.protocols import METHODS
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from servers.limits_of_bodies import body_of, fields, places, with_others

from turret.server.http.endpoint import MAX_BODY_BYTES
from turret.v1 import tinker_pb2

# gRPC's size limit for a message, without the bytes around the field.
_MAX_MESSAGE_BYTES = (4 << 20) - 64
_DEPTH = 4
# The endpoints whose bodies are not JSON.
PASS, UPLOAD = "/api/v1/forward_backward", "/v1/upload_lora_adapter?lora_name=x"
TYPES = {PASS: "application/x-protobuf", UPLOAD: "application/x-tar"}
# Entries of lists, in turn: each has a different cost for parsers and readers.
ENTRIES = (b"{}", b"0", b"[]", b'""', b'{"a":1}', b"[[]]", b"1e-400", b'"ab"')


@dataclass(frozen=True, slots=True)
class Large:
    """A message with the maximum size, or a larger one.

    Attributes:
        target: The path of an endpoint, or the full name of a gRPC method.
        what: The field, for people.
        data: The body or the message.
    """

    target: str
    what: str
    data: bytes

    def __str__(self) -> str:
        return f"{self.target} {self.what}"


def bodies(*, is_short: bool) -> Iterator[Large]:
    """Bodies for every list of every endpoint, and for every field that is read.

    Args:
        is_short: Whether each limit is tried at only one endpoint with one kind of value, and only
            one in four other fields is tried.
    """
    kinds = itertools.cycle(ENTRIES)
    seen: set[object] = set()
    found = places(has_training=True)
    limits = {(place.path, place.steps): place.most for place in found}
    for place in found:
        if is_short and place.steps in seen:
            continue
        seen.add(place.steps)
        if 0 in place.steps:
            # Fill many lists inside a list. A text is invalid in all of these inner lists, which
            # contain numbers or objects.
            times = limits[place.path, place.steps[: place.steps.index(0)]]
            for entry in [b'""'] if is_short else ENTRIES:
                most_bytes = MAX_BODY_BYTES - 200
                body = body_of(place, place.most, most_bytes=most_bytes, entry=entry, times=times)
                data = with_others(place, body)
                what = f"{place.blamed}, up to {times} times: {len(data)} bytes of {entry!r}"
                yield Large(place.path, what, data)
        # In a short run, each place is tried with the next kind of entry and the other count.
        counts = (place.most, MAX_BODY_BYTES)
        for entry in [next(kinds)] if is_short else ENTRIES:
            for count in [counts[len(seen) % 2]] if is_short else counts:
                body = body_of(place, count, most_bytes=MAX_BODY_BYTES - 200, entry=entry)
                data = with_others(place, body)
                yield Large(place.path, f"{place.blamed}: {len(data)} bytes of {entry!r}", data)
    for path, names in fields(has_training=True).items():
        for name in sorted(names):
            if is_short and name in seen:
                continue
            seen.add(name)
            # A short run tries every fourth field, each with the next kind of value.
            if is_short and len(seen) % 4:
                continue
            chosen = len(seen) // 4 % len(_VALUES) if is_short else None
            for number, make in enumerate(_VALUES):
                if chosen in (None, number):
                    value = _with(name, make)
                    yield Large(path, f"{name}: {value[:40]!r}", value)


def _with(name: str, make: Callable[[int], bytes]) -> bytes:
    """A body with a field that is filled up to the given size."""
    start = b'{"model":"base","%b":' % name.encode()
    return start + make(MAX_BODY_BYTES - len(start) - 10) + b"}"


def _nests(room: int) -> bytes:
    nest = b"[" * 60 + b"]" * 60
    return b"[" + b",".join([nest] * (room // 121)) + b"]"


def _names(room: int) -> bytes:
    return b"{" + b",".join(b'"%x":0' % number for number in range(room // 11)) + b"}"


# Long texts (one unterminated), nested values, and an object with many names.
_VALUES: tuple[Callable[[int], bytes], ...] = (
    lambda room: b'"' + b'\\"' * (room // 2) + b'"',
    lambda room: b'"' + b'\\"' * (room // 2),
    lambda room: b'"' + b"x" * room + b'"',
    lambda room: b'"' + b"a+" * (room // 2) + b'"',
    _nests,
    _names,
)


def messages() -> Iterator[Large]:
    """Messages that fill each repeated field, at any depth, of all gRPC methods and of a pass."""
    a_pass: Any = tinker_pb2.TinkerPass.DESCRIPTOR
    targets = [(method.full_name, method.input_type) for method in METHODS]
    for target, kind in (*targets, (PASS, a_pass)):
        for steps, data in _repeated(kind, 0):
            yield Large(target, f"{steps}: {len(data)} bytes", data)


def archives() -> Iterator[Large]:
    """Uploads with as many entries or as long names as possible, and empty ones."""
    names = {"entries": "adapter_config.json", "folders": "a/" * 49, "long names": "a" * 5000}
    for what, name in names.items():
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as archive:
            for number in range(2000):
                archive.addfile(tarfile.TarInfo(f"{number}{name}"))
        yield Large(UPLOAD, what, made.getvalue())
    yield Large(UPLOAD, "zeros", bytes(16 << 20))
    yield Large(UPLOAD, "a huge file", _huge(1 << 33) + bytes(16 << 20))
    yield Large(UPLOAD, "a negative file", _huge(-512) * 1024)


def _huge(size: int) -> bytes:
    info = tarfile.TarInfo("adapter_model.safetensors")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def _repeated(kind: Descriptor, depth: int) -> Iterator[tuple[str, bytes]]:
    for field in kind.fields:
        if field.is_repeated:
            yield field.name, _filled(field)
        if field.message_type is None or depth == _DEPTH:
            continue
        for steps, inner in _repeated(field.message_type, depth + 1):
            yield f"{field.name}.{steps}", _tag(field) + _varint(len(inner)) + inner


def _filled(field: FieldDescriptor) -> bytes:
    """As many entries as fit in a message: empty messages and texts, and the number 1."""
    if field.message_type is None and field.cpp_type != FieldDescriptor.CPPTYPE_STRING:
        return _tag(field) + _varint(_MAX_MESSAGE_BYTES - 200) + b"\1" * (_MAX_MESSAGE_BYTES - 200)
    entry = _tag(field) + b"\0"
    return entry * ((_MAX_MESSAGE_BYTES - 200) // len(entry))


def _tag(field: FieldDescriptor) -> bytes:
    return _varint(field.number << 3 | 2)


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])
