"""The host's part of a decode step, measured with a device that only sleeps, or on the CPU.

    python bench/host.py [--streams 1 16 64] [--ms 2.6 3.0 6.5 | --cpu] [--tokens 300] [--http]

It runs the whole server, except that a step computes nothing: it sleeps as long as a GPU would
compute, and draws fixed tokens. With ``--cpu``, the steps compute. Clients run in another process.
For each number of streams, it prints how long the device waits between two steps with a token of
every stream, and for which share of the time the device computes: with tokens handed out before the
next step and, except with ``--cpu``, during it, as on a GPU. Launches are not measured. All values
are medians.

The last columns are the processor time of the server per token: of the engine's thread, and of all
other threads. They depend less on the cores that the clients take.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest.mock import patch

from protocols import through_grpc, through_http

from turret.server.adapters.state_dir import NoStateDir
from turret.server.app import App
from turret.server.build import Backend, build_backend
from turret.server.config import CacheConfig, Config, ListenConfig, ModelConfig, SchedulerConfig
from turret.server.engine.loop import EngineLoop
from turret.server.engine.scheduling.sequence import Step
from turret.server.engine.step.runner import Runner, StepResult
from turret.server.engine.step.sampler import Draw
from turret.server.metrics import Metrics

# The interpreter's switch interval, as the server sets it for CUDA devices (``server/build.py``).
_SWITCH_SECONDS = 5e-4
# The least share of the time for which a GPU or the CPU should compute.
LEAST_SHARE = 0.85
LEAST_SHARE_ON_CPU = 0.95
_compute = Runner._compute
# Tokens of each stream before the clock starts.
_WARM_UP_TOKENS = 20


@dataclass(slots=True)
class SleepingDevice:
    """Replaces ``Runner._compute``.

    Attributes:
        seconds: How long a step computes; None to compute it on the CPU.
        rows: The steps that are measured have this many sequences.
        waits: The seconds between the end of a step and the next launch.
        periods: The seconds between the ends of two such steps.
    """

    seconds: float | None
    rows: int
    waits: list[float] = field(default_factory=list)
    periods: list[float] = field(default_factory=list)
    _ended: float = 0.0

    @property
    def figures(self) -> tuple[float, float, float]:
        """The seconds of a step, the seconds of waiting, and the share of computing."""
        period, wait = statistics.median(self.periods), statistics.median(self.waits)
        seconds = period - wait if self.seconds is None else self.seconds
        return seconds, wait, seconds / period

    def compute(self, runner: Runner, step: Step, meanwhile: Callable[[], None]) -> StepResult:
        """Sleep like a device, while the host does something else; or compute."""
        launched = time.perf_counter()
        if self.seconds is None:
            result = _compute(runner, step, meanwhile)
        else:
            meanwhile()
            time.sleep(max(launched + self.seconds - time.perf_counter(), 0.0))
            drawn = ((item.sequence, item.sequence.num_computed) for item in step.scheduled)
            result = StepResult({one: [Draw(1000 + 7 * at % 20000)] for one, at in drawn})
        ended = time.perf_counter()
        if self._ended and len(step.scheduled) == self.rows:
            self.waits.append(launched - self._ended)
            self.periods.append(ended - self._ended)
        self._ended = ended
        return result


def _processor_seconds() -> tuple[float, float]:
    """The processor time of the engine's thread, and of all other threads."""
    threads = {thread.name: thread for thread in threading.enumerate()}
    clock = time.pthread_getcpuclockid(threads["engine"].ident or 0)
    engine = time.clock_gettime(clock)
    return engine, time.process_time() - engine


async def measure(
    app: App, device: SleepingDevice, tokens: int, *, is_http: bool
) -> tuple[float, ...]:
    """Run the clients; returns the device's figures, and the processor time per token."""
    assert app.rpc is not None
    assert app.http is not None
    address = app.http.address if is_http else app.rpc.address
    arguments = [address, str(device.rows), str(tokens), *(["--http"] if is_http else [])]
    with patch.object(Runner, "_compute", lambda *args: device.compute(*args)):
        command = [sys.executable, __file__, "--client", *arguments]
        before = _processor_seconds()
        child = await asyncio.create_subprocess_exec(*command)
        assert not await child.wait(), "the client failed"
    every = device.rows * (tokens + _WARM_UP_TOKENS)
    spent = zip(before, _processor_seconds(), strict=True)
    return *device.figures, *((after - before) / every for before, after in spent)


async def compare(args: argparse.Namespace) -> bool:
    """Print a line for each number of streams; returns whether the device computes enough."""
    config = Config(
        model=ModelConfig(device="cpu"),
        cache=CacheConfig(kv_cache_bytes=256 << 20),
        scheduler=SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=4096, speculation="off"),
        listen=ListenConfig(
            address="127.0.0.1:0", metrics_address=None, http_address="127.0.0.1:0"
        ),
    )
    loops: list[EngineLoop] = []

    def build(config: Config, metrics: Metrics, state: NoStateDir) -> Backend:
        backend = build_backend(config, metrics, state=state)
        loops.append(backend.engine._loop)
        return backend

    app = App(config, build=build)
    await app.startup()
    if not args.cpu:
        sys.setswitchinterval(_SWITCH_SECONDS)
    is_good = True
    print(
        f"{'streams':>8}{'device ms':>11}{'handed out':>12}{'waits ms':>10}{'computes':>10}"
        f"{'engine µs':>11}{'others µs':>11}"
    )
    try:
        for streams, ms in zip(args.streams, args.ms, strict=True):
            found: dict[bool, list[tuple[float, ...]]] = {}
            for is_during_step in ([False] if args.cpu else [False, True]) * args.rounds:
                loops[0]._runner.is_asynchronous = is_during_step
                device = SleepingDevice(None if args.cpu else 1e-3 * ms, streams)
                figures = await measure(app, device, args.tokens, is_http=args.http)
                found.setdefault(is_during_step, []).append(figures)
            for is_during_step, results in found.items():
                seconds, waits, share, *spent = map(statistics.median, zip(*results, strict=True))
                if is_during_step or args.cpu:
                    is_good &= share >= (LEAST_SHARE_ON_CPU if args.cpu else LEAST_SHARE)
                handed_out = "during" if is_during_step else "before"
                print(
                    f"{streams:>8}{1e3 * seconds:>11.1f}{handed_out:>12}{1e3 * waits:>10.2f}"
                    f"{share:>10.0%}{1e6 * spent[0]:>11.1f}{1e6 * spent[1]:>11.1f}",
                    flush=True,
                )
    finally:
        await app.shutdown()
    return is_good


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--client", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--ms", type=float, nargs="+", default=[2.6, 3.0, 6.5])
    parser.add_argument("--cpu", action="store_true", help="compute the steps")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--http", action="store_true", help="use HTTP instead of gRPC")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.client:
        address, streams, tokens = args.client
        run = through_http if args.http else through_grpc
        asyncio.run(run(address, int(streams), _WARM_UP_TOKENS))
        asyncio.run(run(address, int(streams), int(tokens)))
        return 0
    return 0 if asyncio.run(compare(args)) else 1


if __name__ == "__main__":
    sys.exit(main())
