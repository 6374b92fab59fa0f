"""Hand-written gRPC calls, with headers and frames that no gRPC library would send."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Generator, Sequence

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_CANCEL = 8  # an error code
_INITIAL_WINDOW = 4  # a setting
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
    # With an initial window of 0 the server may send headers, but no data.
    return _begun(address, path, message, (), struct.pack(">HI", _INITIAL_WINDOW, 0), 10.0)


def accepted_bytes(
    address: str,
    path: str,
    headers: Sequence[tuple[str, str]],
    num_calls: int,
    size: int,
    quiet_seconds: float,
) -> int:
    """Begin calls whose messages never end, and count the bytes of them that the server accepts.

    Args:
        address: ``HOST:PORT`` of a server without TLS.
        path: ``/package.Service/Method``.
        headers: Headers in addition to those that gRPC requires.
        num_calls: The number of calls, all on one connection.
        size: The announced size of each message.
        quiet_seconds: Stop if the server has accepted nothing for this long.
    """
    # The flow-control window of the connection (0) and of each call.
    room = dict.fromkeys((0, *(2 * each + 1 for each in range(num_calls))), 65535)
    left = {number: size - 1 for number in room if number}
    initial, accepted = 65535, 0
    with (
        _begun(address, path, b"", headers, b"", 10.0, is_open=True) as connection,
        contextlib.closing(_frames(connection)) as frames,
    ):
        for number in left:
            if number > 1:
                connection.sendall(_headers(address, path, headers, number))
            connection.sendall(_frame(_DATA, 0, number, b"\0" + struct.pack(">I", size)))
            room[number] -= 5
            room[0] -= 5
        connection.settimeout(quiet_seconds)
        while True:
            for number in left:
                while (piece := min(room[0], room[number], left[number], 16384)) > 0:
                    connection.sendall(_frame(_DATA, 0, number, bytes(piece)))
                    room[0] -= piece
                    room[number] -= piece
                    left[number] -= piece
                    accepted += piece
            try:
                kind, flags, number, payload = next(frames)
            except TimeoutError:
                return accepted
            if kind == _WINDOW_UPDATE:
                room[number] += int.from_bytes(payload, "big")
            if kind in (_SETTINGS, _PING) and not flags & _ACK:
                connection.sendall(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
            if kind == _SETTINGS and not flags & _ACK:
                for setting, value in struct.iter_unpack(">HI", payload):
                    if setting == _INITIAL_WINDOW:
                        for each in left:
                            room[each] += value - initial
                        initial = value


def reset_calls(
    address: str, path: str, headers: Sequence[tuple[str, str]], num_calls: int, seconds: float
) -> None:
    """Begin calls on one connection and reset each at once; wait until the server has read this.

    Args:
        address: ``HOST:PORT`` of a server without TLS.
        path: ``/package.Service/Method``.
        headers: Headers in addition to those that gRPC requires.
        num_calls: The number of calls.
        seconds: The maximum wait for a single read.
    """
    with (
        _connected(address, b"", seconds) as connection,
        contextlib.closing(_frames(connection)) as frames,
    ):
        for kind, flags, number, payload in frames:
            if kind == _PING and flags & _ACK:
                # The server has read all frames before this ping.
                return
            if kind == _PING:
                connection.sendall(_frame(_PING, _ACK, number, payload))
            if kind == _SETTINGS and not flags & _ACK:
                connection.sendall(_frame(_SETTINGS, _ACK, 0, b""))
                reset = _CANCEL.to_bytes(4, "big")
                for each in range(1, 2 * num_calls, 2):
                    connection.sendall(
                        _headers(address, path, headers, each) + _frame(_RST_STREAM, 0, each, reset)
                    )
                connection.sendall(_frame(_PING, 0, 0, bytes(8)))


def wait_until_closed(address: str, seconds: float) -> None:
    """Open a connection, and wait until the server closes it; OSError if it is silent for long."""
    with _connected(address, b"", seconds) as connection, contextlib.suppress(ConnectionError):
        for kind, flags, _, _ in _frames(connection):
            # Without this acknowledgement the server closes the connection a minute later.
            if kind == _SETTINGS and not flags & _ACK:
                connection.sendall(_frame(_SETTINGS, _ACK, 0, b""))


def _connected(address: str, settings: bytes, seconds: float) -> socket.socket:
    """A connection without calls."""
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), seconds)
    connection.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, settings))
    return connection


def _begun(
    address: str,
    path: str,
    message: bytes,
    headers: Sequence[tuple[str, str]],
    settings: bytes,
    seconds: float,
    *,
    is_open: bool = False,
) -> socket.socket:
    """A connection on which a call was sent; its message is missing if the call stays open."""
    connection = _connected(address, settings, seconds)
    connection.sendall(_headers(address, path, headers, 1))
    if not is_open:
        data = b"\0" + struct.pack(">I", len(message)) + message
        connection.sendall(_frame(_DATA, _END_STREAM, 1, data))
    return connection


def _headers(address: str, path: str, headers: Sequence[tuple[str, str]], number: int) -> bytes:
    """The frame that begins a call."""
    fields = [
        *((":method", "POST"), (":scheme", "http"), (":path", path)),
        *((":authority", address.rpartition(":")[0]), ("te", "trailers")),
        ("content-type", "application/grpc"),
        *headers,
    ]
    return _frame(_HEADERS, _END_HEADERS, number, b"".join(_literal(*each) for each in fields))


def _frames(connection: socket.socket) -> Generator[tuple[int, int, int, bytes]]:
    with connection.makefile("rb") as stream:
        while True:
            head = stream.read(9)
            if len(head) < 9:
                raise ConnectionError("the server closed the connection")
            size = int.from_bytes(head[:3], "big")
            kind, flags, number = struct.unpack(">BBI", head[3:])
            yield kind, flags, number, stream.read(size)
