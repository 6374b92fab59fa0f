"""One hand-written gRPC call, with headers that no gRPC library would send."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _PING, _GOAWAY = 0, 1, 4, 6, 7
_ACK, _END_STREAM, _END_HEADERS = 1, 1, 4


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(name: str, value: str) -> bytes:
    """A header field without indexing and without Huffman codes (RFC 7541, section 6.2.2)."""
    assert len(name) < 127
    assert len(value) < 127
    return b"".join((b"\0", bytes([len(name)]), name.encode(), bytes([len(value)]), value.encode()))


def unary(
    address: str, path: str, message: bytes, headers: Sequence[tuple[str, str]], seconds: float
) -> bytes | None:
    """Make a call, and wait for its end.

    Args:
        address: ``HOST:PORT`` of a server without TLS.
        path: ``/package.Service/Method``.
        message: The serialised request.
        headers: Headers in addition to those that gRPC requires.
        seconds: The maximum wait for a single read.

    Returns:
        The serialised answer; None if the call ended without one.

    Raises:
        OSError: The server closed the connection, or was silent for too long.
    """
    host, _, port = address.rpartition(":")
    fields = [
        *((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", host)),
        *(("te", "trailers"), ("content-type", "application/grpc")),
        *headers,
    ]
    block = b"".join(_literal(*field) for field in fields)
    body = b"\0" + struct.pack(">I", len(message)) + message
    answer = b""
    with socket.create_connection((host, int(port)), seconds) as connection:
        connection.sendall(
            _PREFACE
            + _frame(_SETTINGS, 0, 0, b"")
            + _frame(_HEADERS, _END_HEADERS, 1, block)
            + _frame(_DATA, _END_STREAM, 1, body)
        )
        for kind, flags, stream, payload in _frames(connection):
            if kind in (_SETTINGS, _PING) and not flags & _ACK:
                echoed = payload if kind == _PING else b""
                connection.sendall(_frame(kind, _ACK, 0, echoed))
            if kind == _GOAWAY:
                raise ConnectionError("the server closed the connection")
            if kind == _DATA and stream == 1:
                answer += payload
            if kind in (_DATA, _HEADERS) and stream == 1 and flags & _END_STREAM:
                break
    return answer[5:] if answer else None


def _frames(connection: socket.socket) -> Iterator[tuple[int, int, int, bytes]]:
    with connection.makefile("rb") as stream:
        while True:
            head = stream.read(9)
            if len(head) < 9:
                raise ConnectionError("the server closed the connection")
            size = int.from_bytes(head[:3], "big")
            kind, flags, number = struct.unpack(">BBI", head[3:])
            yield kind, flags, number, stream.read(size)
