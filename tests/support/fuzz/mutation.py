"""Inputs that are slightly damaged copies of others, for fuzzing without coverage."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fuzz.targets import MAX_BYTES

# Critical tokens for parsers of JSON, protobuf, safetensors and token files.
_TOKENS = (
    *(b"\x00", b"\xff", b"\x80", b"\\ud800", b"\\u0000", b"1e400", b"-1", b"NaN", b"null", b"{}"),
    *(b"[]", b'""', b"true", b"9" * 30, b'{"":' * 5, b"[" * 200, b"\xff" * 9 + b"\x01", b"\r"),
    *(b",", b'"r": 1e9', b'"peft_type": "LOHA"'),
    b'"shape": [0, 2147483647, 2147483647, 2147483647]',
)


def mutated(source: random.Random, corpus: Sequence[bytes]) -> bytes:
    """One of the inputs after one to six changes, at most ``MAX_BYTES`` long."""
    data = bytearray(source.choice(corpus))
    for _ in range(source.randint(1, 6)):
        at = source.randrange(len(data) + 1)
        end = min(at + source.choice((1, 1, 2, 4, 16, 64)), len(data))
        kind = source.randrange(6)
        if kind == 0:
            data[at:at] = source.choice(_TOKENS)
        elif kind == 1:
            data[at:end] = source.choice(_TOKENS)
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end] * source.choice((1, 2, 50))
        elif kind == 4 and at < len(data):
            data[at] ^= 1 << source.randrange(8)
        else:
            other = source.choice(corpus)
            start = source.randrange(len(other) + 1)
            data[at:end] = other[start : start + source.choice((1, 4, 16, 64, 256))]
    return bytes(data[:MAX_BYTES])
