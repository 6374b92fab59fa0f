"""The inputs with which fuzzers begin: committed ones, and the valid calls of ``valid.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from checkout import ROOT
from fuzz.protocols import METHODS, PASS, PATHS, TRAINING_PATHS
from fuzz.recipes import recipe
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from turret.v1 import tinker_pb2

FOLDER = ROOT / "tests" / "fuzz"
# The keys: "message" has the messages of a call by method, "http" a body by path, "training" the
# calls of each session, and "bodies" a path with pieces for each body. There, a pair [piece, n]
# stands for 2^n copies of the piece (``recipe``).
VALID = json.loads((FOLDER / "valid.json").read_text(encoding="utf-8"))


def seeds() -> Iterator[tuple[str, bytes]]:
    """Every input with the name of its target.

    The committed inputs are in ``corpus/<target>``: files, and inputs that once caused a failure.
    """
    for path in sorted(FOLDER.glob("corpus/*/*")):
        yield path.parent.name, path.read_bytes()
    yield from valid()


def valid() -> Iterator[tuple[str, bytes]]:
    """The valid calls, each with the name of its target."""
    for name, bodies in VALID["message"].items():
        kind = GetMessageClass(method_of(name).input_type)
        yield "message", encoded([ParseDict(body, kind()) for body in bodies], name)
    for path, body in VALID["http"].items():
        yield "http", bytes([PATHS.index(path)]) + json.dumps(body).encode()
    for path, *pieces in VALID["bodies"]:
        counted = (each if isinstance(each, list) else (each, 0) for each in pieces)
        made = recipe(*((piece.encode(), power) for piece, power in counted))
        yield "bodies", bytes([PATHS.index(path)]) + made
    for calls in VALID["training"]:
        yield "training", _session(calls)


def _session(calls: Sequence[tuple[str, Any]]) -> bytes:
    """The calls of a session in the form of the target ``training``."""
    made = b""
    for name, sent in calls:
        path = f"/api/v1/{name}"
        is_pass = path == PASS
        body = ParseDict(sent, tinker_pb2.TinkerPass()).SerializeToString() if is_pass else b""
        body = body or json.dumps(sent).encode()
        made += bytes([TRAINING_PATHS.index(path)]) + len(body).to_bytes(2, "little") + body
    return made


def method_of(name: str) -> Any:
    return next(method for method in METHODS if method.name == name)


def encoded(messages: Sequence[Message], name: str) -> bytes:
    """The messages of a call in the form of the target ``message``."""
    parts = [each.SerializeToString() for each in messages]
    # A message whose length does not fit into two bytes is truncated.
    cut = [part[: (1 << 16) - 1] for part in parts]
    number = METHODS.index(method_of(name))
    return bytes([number]) + b"".join(len(p).to_bytes(2, "little") + p for p in cut)
