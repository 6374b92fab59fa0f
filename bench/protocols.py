"""The same streams through both APIs of one server: compares the throughput of HTTP and gRPC.

    python bench/protocols.py [--rounds 5] [--streams 16] [--tokens 64]

Both APIs run in every round, in alternating order, so that other load on the machine affects both
alike. The result is the ratio of the rates. The table also shows the processor time per token of
the server's event loop and of the client, which depends less on other load. Connections are open
before the clock starts. The HTTP client is a socket that parses only the last event, because it
shares the machine with the server. A client library takes milliseconds per request, so 16 requests
would reach the engine in different steps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

import grpc
import psutil

from turret.server.server_process import ServerProcess
from turret.v1 import inference_pb2

_PROMPT = "Tell me a long story of a turret with many lenses, and of each lens."
# Lowest accepted throughput of HTTP relative to gRPC.
LEAST_RATIO = 0.97


async def through_grpc(address: str, streams: int, tokens: int) -> float:
    """The tokens per second of all streams together."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_stream(
            "/turret.v1.Inference/GenerateStream",
            request_serializer=inference_pb2.GenerateRequest.SerializeToString,
            response_deserializer=inference_pb2.GenerateChunk.FromString,
        )

        async def one() -> int:
            message = inference_pb2.GenerateRequest(prompt=_PROMPT)
            message.stop.max_tokens = tokens
            message.stop.ignore_eos = True
            message.sampling.temperature = 0
            return [chunk async for chunk in call(message)][-1].usage.completion_tokens

        await channel.channel_ready()
        return await _rate(one, streams)


async def through_http(address: str, streams: int, tokens: int) -> float:
    """The same over HTTP, as server-sent events."""
    body = {
        "model": "base",
        "prompt": _PROMPT,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(sent)}\r\n\r\n"
    host, _, port = address.rpartition(":")
    opened = [await asyncio.open_connection(host, int(port)) for _ in range(streams)]

    async def one() -> int:
        reader, writer = opened.pop()
        writer.write(head.encode() + sent)
        last = b""
        while part := await reader.read(1 << 16):
            last = (last + part)[-4096:]
        writer.close()
        event = last.rpartition(b"data: [DONE]")[0].rpartition(b"data: ")[2]
        return json.loads(event.partition(b"\n")[0])["usage"]["completion_tokens"]

    return await _rate(one, streams)


async def _rate(one: Callable[[], Awaitable[int]], streams: int) -> float:
    start = time.perf_counter()
    counts = await asyncio.gather(*(one() for _ in range(streams)))
    return sum(counts) / (time.perf_counter() - start)


def _loop_seconds(pid: int) -> float:
    """The processor time of the server's main thread, which runs its event loop."""
    threads = psutil.Process(pid).threads()
    return sum(one.user_time + one.system_time for one in threads if one.id == pid)


def main(argv: list[str] | None = None) -> int:
    """Print the rates and their ratio; the exit code is 1 if HTTP is too slow."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args(argv)
    rates: dict[str, list[float]] = {"gRPC": [], "HTTP": []}
    costs: dict[str, list[tuple[float, float]]] = {"gRPC": [], "HTTP": []}
    # Turn off speculation so that each chunk has one token.
    with ServerProcess(["--http-address", "127.0.0.1:0", "--speculation", "off"]) as server:
        server.wait()
        protocols = [
            ("gRPC", lambda: through_grpc(server.address, args.streams, args.tokens)),
            ("HTTP", lambda: through_http(server.http_address, args.streams, args.tokens)),
        ]
        for number in range(args.rounds + 1):
            for name, run in protocols if number % 2 else reversed(protocols):
                before = _loop_seconds(server.process.pid), sum(os.times()[:2])
                rate = asyncio.run(run())
                after = _loop_seconds(server.process.pid), sum(os.times()[:2])
                # The first round warms the server up.
                if number:
                    rates[name].append(rate)
                    spent = 1e6 / (args.streams * args.tokens)
                    loop, client = ((b - a) * spent for a, b in zip(before, after, strict=True))
                    costs[name].append((loop, client))
    for name, found in rates.items():
        shown = " ".join(f"{rate:.0f}" for rate in found)
        loop, client = (statistics.median(kind) for kind in zip(*costs[name], strict=True))
        print(f"{name}: median {statistics.median(found):.1f} tokens/s ({shown})")
        print(f"    processor time per token: event loop {loop:.0f} µs, client {client:.0f} µs")
    pairs = zip(rates["HTTP"], rates["gRPC"], strict=True)
    by_round = statistics.median(http / rpc for http, rpc in pairs)
    ratio = statistics.median(rates["HTTP"]) / statistics.median(rates["gRPC"])
    print(f"HTTP / gRPC: {ratio:.3f} of medians, {by_round:.3f} median of rounds")
    return 0 if max(ratio, by_round) >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
