"""The chunks of an answer that is streamed, written straight to its connection."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

# Send at once when more than this is held back.
_MAX_HELD_BYTES = 64 << 10
# Name of the ASGI extension that holds a request's ``Chunks``.
EXTENSION = "turret.chunks"


class Chunks:
    """Writes what comes at once as one chunk.

    An event of a few bytes passes no layer between here and the socket; and of a stream whose
    tokens have piled up, all that are there go out together. The head, and the last chunk, go the
    ordinary way: uvicorn keeps no count of what is between them.

    Args:
        cycle: The request that is answered, by HTTP/1.1 and without a length.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._loop = asyncio.get_running_loop()
        self._held: list[bytes] = []
        self._num_bytes = 0

    async def write(self, data: bytes) -> None:
        """Send bytes before the event loop waits again.

        Waits while the client does not read what it got.
        """
        if not self._held:
            self._loop.call_soon(self.flush)
        self._held.append(data)
        self._num_bytes += len(data)
        cycle = self._cycle
        if cycle.flow.write_paused or self._num_bytes > _MAX_HELD_BYTES:
            self.flush()
            if cycle.flow.write_paused and not cycle.disconnected:
                await cycle.flow.drain()

    def flush(self) -> None:
        """Send now what is held."""
        if not self._held:
            return
        data = b"".join(self._held)
        self._held.clear()
        self._num_bytes = 0
        if not (self._cycle.disconnected or self._cycle.response_complete):
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
