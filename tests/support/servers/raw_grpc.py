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
    answer = b""
    with _begun(address, path, message, headers, b"", seconds) as connection:
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


def unread(address: str, path: str, message: bytes) -> socket.socket:
    """Make a call without room for its answer, which waits until the connection is closed."""
    # SETTINGS_INITIAL_WINDOW_SIZE (4) of 0: the server may send headers, but no data.
    return _begun(address, path, message, (), struct.pack(">HI", 4, 0), 10.0)


def _begun(
    address: str,
    path: str,
    message: bytes,
    headers: Sequence[tuple[str, str]],
    settings: bytes,
    seconds: float,
) -> socket.socket:
    """A connection on which a call was sent."""
    host, _, port = address.rpartition(":")
    fields = [
        *((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", host)),
        *(("te", "trailers"), ("content-type", "application/grpc")),
        *headers,
    ]
    block = b"".join(_literal(*field) for field in fields)
    connection = socket.create_connection((host, int(port)), seconds)
    connection.sendall(
        _PREFACE
        + _frame(_SETTINGS, 0, 0, settings)
        + _frame(_HEADERS, _END_HEADERS, 1, block)
        + _frame(_DATA, _END_STREAM, 1, b"\0" + struct.pack(">I", len(message)) + message)
    )
    return connection


def _frames(connection: socket.socket) -> Iterator[tuple[int, int, int, bytes]]:
    with connection.makefile("rb") as stream:
        while True:
            head = stream.read(9)
            if len(head) < 9:
                raise ConnectionError("the server closed the connection")
            size = int.from_bytes(head[:3], "big")
            kind, flags, number = struct.unpack(">BBI", head[3:])
            yield kind, flags, number, stream.read(size)
