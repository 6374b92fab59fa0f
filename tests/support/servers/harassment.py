"""A malicious client that sends bad traffic at a low rate, alongside normal clients."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator

import grpc
from fuzz.corpus import seeds
from fuzz.mutation import mutated
from fuzz.protocols import METHODS

from turret.v1 import inference_pb2, inference_pb2_grpc

# Statuses that a server must not return for any input.
BUGS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS)
# Only these services: others change the registered adapters, which tests that compare answers
# assume to be constant.
_HARMLESS = ("Inference", "Health")


class Harassment:
    """Sends damaged messages, opens silent connections, and starts streams that it does not read.

    Args:
        address: The server's address.
        source: The random generator of all choices.

    Attributes:
        seen: Counts of the results.
    """

    def __init__(self, address: str, source: random.Random) -> None:
        self.seen: Counter[str] = Counter()
        self.bugs: list[str] = []
        self._address = address
        self._random = source
        self._seeds = [data for name, data in seeds() if name == "message"]

    async def once(self) -> None:
        """Make one random attack."""
        attack = self._random.choice(
            (self._damaged, self._damaged, self._silent, self._unread, self._without_message)
        )
        self.seen[attack.__name__] += 1
        await attack()

    async def _damaged(self) -> None:
        data = mutated(self._random, self._seeds) or b"\0"
        methods = [m for m in METHODS if m.containing_service.name in _HARMLESS]
        method = methods[data[0] % len(methods)]
        path = f"/{method.containing_service.full_name}/{method.name}"
        async with grpc.aio.insecure_channel(self._address) as channel:
            call = channel.unary_stream(path)(data[3:], timeout=5.0)
            try:
                async for _ in call:
                    pass
            except grpc.aio.AioRpcError as error:
                if error.code() in BUGS:
                    self.bugs.append(f"{path} {data!r}: {error}")

    async def _silent(self) -> None:
        host, _, port = self._address.rpartition(":")
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"PRI * HTTP/2.0"[: self._random.randint(0, 14)])
            await asyncio.sleep(self._random.uniform(0.0, 3.0))
            writer.transport.abort()

    async def _unread(self) -> None:
        request = inference_pb2.GenerateRequest(prompt="a b c")
        request.stop.max_tokens = 60
        request.options.logprobs = True
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[arg-type]
            call = stub.GenerateStream(request)
            await asyncio.sleep(self._random.uniform(0.0, 1.0))
            call.cancel()

    async def _without_message(self) -> None:
        async def nothing() -> AsyncIterator[bytes]:
            await asyncio.Event().wait()
            yield b""

        async with grpc.aio.insecure_channel(self._address) as channel:
            call = channel.stream_unary("/turret.v1.Inference/Generate")(nothing())
            await asyncio.sleep(self._random.uniform(0.0, 1.0))
            call.cancel()
