"""Large bodies from a few bytes: a fuzzer changes their structure instead of their bytes."""

from __future__ import annotations

from turret.server.http.endpoint import MAX_BODY_BYTES

# The pieces of a body. A recipe consists of pairs of bytes: the piece, and the exponent of its
# count.
PIECES = (
    *(b'{"model":"base",', b'"messages":', b'"prompt":', b'"input":', b'"tools":', b'"stop":'),
    *(b'"logit_bias":', b'"metadata":', b'"adapters":', b'"tool_calls":', b'"content":', b'"x":'),
    *(b"[", b"]", b"{", b"}", b",", b":", b'"', b'\\"', b"\\", b" ", b"a", b"+m", b"*0", b"9"),
    *(b"{},", b"[],", b"[[]],", b'"",', b'"a":1,', b"1,", b"1e-400,", b'{"role":"user"},', b"null"),
    *(b'{"type":"function","function":{"name":"f"}},', b'{"role":"user","content":"a"}'),
    *(b"\\ud800", b"\\ud800", b"\\u00e9", b"\xc3\xa9", b"\xff"),
)
_POWERS = MAX_BODY_BYTES.bit_length()


def body(recipe: bytes) -> bytes:
    """The body for a recipe, up to the maximum size of a body."""
    made = bytearray()
    for piece, power in zip(recipe[::2], recipe[1::2], strict=False):
        what = PIECES[piece % len(PIECES)]
        room = (MAX_BODY_BYTES - len(made)) // len(what)
        made += what * min(1 << power % _POWERS, room)
    return bytes(made)


def recipe(*parts: tuple[bytes, int]) -> bytes:
    """The recipe of pieces and the exponents of their counts."""
    return bytes(byte for piece, power in parts for byte in (PIECES.index(piece), power))
