"""The host's part of a decode step on a GPU, measured with a device that only sleeps.

    python bench/host.py [--streams 1 16 64] [--ms 2.6 3.0 6.5] [--tokens 200] [--http]

It runs the whole server, except that a step computes nothing: it sleeps as long as a GPU would
compute, and draws fixed tokens. Clients run in another process. For each number of streams, it
prints how long the device waits between two steps, and which share of the time it computes: with
tokens handed out before the next step, and beside it as on a GPU. Launches are not part of it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
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

# As on CUDA (``server/build.py``).
_SWITCH_SECONDS = 5e-4
# The least share of the time for which a GPU should compute.
LEAST_SHARE = 0.85


@dataclass(slots=True)
class SleepingDevice:
    """Replaces ``Runner._compute``.

    Attributes:
        seconds: How long a step computes.
        rows: The steps that are measured have this many sequences.
        waits: The seconds between the end of a step and the next launch.
    """

    seconds: float
    rows: int
    waits: list[float] = field(default_factory=list)
    _ended: float = 0.0

    def compute(self, step: Step, meanwhile: Callable[[], None]) -> StepResult:
        """Sleep like a device, while the host does something else."""
        launched = time.perf_counter()
        if self._ended and len(step.scheduled) == self.rows:
            self.waits.append(launched - self._ended)
        meanwhile()
        time.sleep(max(launched + self.seconds - time.perf_counter(), 0.0))
        self._ended = time.perf_counter()
        drawn = ((item.sequence, item.sequence.num_computed) for item in step.scheduled)
        return StepResult({sequence: [Draw(1000 + 7 * at % 20000)] for sequence, at in drawn})


async def measure(
    app: App, device: SleepingDevice, tokens: int, *, is_http: bool
) -> tuple[float, float]:
    """The median seconds that the device waits, and the tokens per second of all streams."""
    assert app.rpc is not None
    assert app.http is not None
    address = app.http.address if is_http else app.rpc.address
    arguments = [address, str(device.rows), str(tokens), *(["--http"] if is_http else [])]
    with patch.object(Runner, "_compute", lambda _, *args: device.compute(*args)):
        command = [sys.executable, __file__, "--client", *arguments]
        child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        out, _ = await child.communicate()
    assert child.returncode == 0, "the client failed"
    return statistics.median(device.waits), float(out)


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
    sys.setswitchinterval(_SWITCH_SECONDS)
    is_good = True
    print(f"{'streams':>8}{'device ms':>11}{'handed out':>12}{'waits ms':>10}{'computes':>10}")
    try:
        for streams, ms in zip(args.streams, args.ms, strict=True):
            found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
            for beside in [False, True] * args.rounds:
                loops[0]._runner.is_asynchronous = beside
                device = SleepingDevice(1e-3 * ms, streams)
                found[beside].append(await measure(app, device, args.tokens, is_http=args.http))
            for beside, results in found.items():
                waits, rate = (statistics.median(kind) for kind in zip(*results, strict=True))
                share = rate * 1e-3 * ms / streams
                is_good &= share >= LEAST_SHARE or not beside
                name = "beside" if beside else "before"
                print(f"{streams:>8}{ms:>11.1f}{name:>12}{1e3 * waits:>10.2f}{share:>10.0%}")
    finally:
        await app.shutdown()
    return is_good


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--client", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--ms", type=float, nargs="+", default=[2.6, 3.0, 6.5])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--http", action="store_true", help="use HTTP instead of gRPC")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.client:
        address, streams, tokens = args.client
        run = through_http if args.http else through_grpc
        asyncio.run(run(address, int(streams), 20))
        print(asyncio.run(run(address, int(streams), int(tokens))))
        return 0
    return 0 if asyncio.run(compare(args)) else 1


if __name__ == "__main__":
    sys.exit(main())
