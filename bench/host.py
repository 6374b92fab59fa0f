"""The share of a device's speed that reaches clients, measured on a server with a simulated device.

    python bench/host.py [--streams 16 64] [--step-ms 3 5] [--tokens 200] [--door grpc]

Scheduler, engine thread, event loop and API are those of a real server, on the CPU. Instead of
computing, a step holds the GIL for the time of its launches (``--launch-ms``), and then sleeps,
which releases the GIL like waiting for a GPU. Clients run in a separate process. For each number of
streams, the benchmark prints tokens per second, and their share of the device's rows per step.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from unittest.mock import patch

import doors

from turret.server.app import App
from turret.server.config import CacheConfig, Config, ListenConfig, ModelConfig, SchedulerConfig
from turret.server.engine.scheduling.sequence import Step
from turret.server.engine.step.runner import Runner, StepResult
from turret.server.engine.step.sampler import Draw

_ROUNDS = 3


@contextlib.contextmanager
def sleeping_device(step_seconds: float, launch_seconds: float) -> Iterator[list[float]]:
    """Make every step take this long and draw arbitrary tokens; yields the ends of steps."""
    ended: list[float] = []

    def compute(runner: Runner, step: Step) -> StepResult:
        until = time.perf_counter() + launch_seconds
        while time.perf_counter() < until:
            pass
        time.sleep(step_seconds)
        ended.append(time.perf_counter())
        sequences = [item.sequence for item in step.scheduled if item.samples]
        return StepResult({s: [Draw(1000 + s.num_computed * 7 % 20000)] for s in sequences})

    with patch.object(Runner, "_compute", compute):
        yield ended


async def measure(streams: int, step_ms: float, args: argparse.Namespace) -> float:
    """The tokens per second of all streams, as the median of several rounds."""
    config = Config(
        model=ModelConfig(device="cpu"),
        cache=CacheConfig(kv_cache_bytes=256 << 20),
        scheduler=SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=4096, speculation="off"),
        listen=ListenConfig(
            address="127.0.0.1:0", metrics_address=None, http_address="127.0.0.1:0"
        ),
    )
    app = App(config)
    with sleeping_device(step_ms / 1e3, args.launch_ms / 1e3):
        await app.startup()
        door = app.rpc if args.door == "grpc" else app.http
        assert door is not None
        command = [sys.executable, __file__, "--client", door.address, "--door", args.door]
        command += ["--streams", str(streams), "--tokens", str(args.tokens)]
        child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        rates, _ = await child.communicate()
        await app.shutdown()
    return statistics.median(map(float, rates.split()))


def ask(args: argparse.Namespace) -> None:
    """Request all streams from a server at once, and print the rates."""
    run = doors.through_grpc if args.door == "grpc" else doors.through_http
    (streams,) = args.streams
    asyncio.run(run(args.client, streams, 20))
    for _ in range(_ROUNDS):
        print(asyncio.run(run(args.client, streams, args.tokens)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure the share of a device's speed that reaches clients."
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--step-ms", type=float, nargs="+", default=[3.0, 5.0])
    parser.add_argument("--launch-ms", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--door", choices=["grpc", "http"], default="grpc")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client is not None:
        ask(args)
        return
    for streams, step_ms in zip(args.streams, args.step_ms, strict=True):
        rate = asyncio.run(measure(streams, step_ms, args))
        ideal = streams / step_ms * 1e3
        print(
            f"{args.door}, {streams} streams, steps of {step_ms} ms: {rate:.0f} tokens/s,"
            f" {rate / ideal:.0%} of rows per step",
            flush=True,
        )


if __name__ == "__main__":
    main()
