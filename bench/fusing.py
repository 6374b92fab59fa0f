"""What fusing adapters costs the requests that run beside it.

    python bench/fusing.py [--pairs 6] [--window 5]

Sixteen requests at a time decode without a pause; in every other window adapters are fused one
after the other (truncated SVD of eight adapters of rank 16 on seven projections). Prints tokens per
second of both kinds of windows. Run it with OMP_NUM_THREADS=1 to leave a core of two to the fusing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common.machine import describe, require_idle
from common.random_lora import write_random_loras
from common.report import append_rows, make_console, print_rows
from scale.workload import TOKEN_IDS

from turret.clients.aio import AdapterWeight, AsyncTurretClient
from turret.server.models.families import read_arch
from turret.server.models.model_source import resolve_model
from turret.server.models.sources.cache import default_cache_dir
from turret.server.server_process import ServerProcess

_FUSED = 8
_RANK = 16
_NEW_TOKENS = 100
_PROMPT_TOKENS = 32


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for flag, kind, default, text in (
        ("--batch", int, 16, "requests at a time, each with an adapter of its own"),
        ("--pairs", int, 6, "windows of each kind"),
        ("--window", float, 5.0, "seconds of a window"),
    ):
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--no-save", action="store_true", help="keep no results")
    return parser.parse_args(argv)


class Traffic:
    """Requests without a pause; counts the tokens that arrive."""

    def __init__(self, client: AsyncTurretClient, names: list[str]) -> None:
        self._client = client
        self._names = names
        self.tokens = 0

    async def run(self, number: int) -> None:
        draw = random.Random(number)
        while True:
            stream = self._client.generate_stream(
                [draw.choice(TOKEN_IDS) for _ in range(_PROMPT_TOKENS)],
                adapters=self._names[number],
                temperature=0.0,
                max_tokens=_NEW_TOKENS,
                ignore_eos=True,
                token_ids=True,
            )
            async for chunk in stream:
                self.tokens += len(chunk.token_ids)

    async def rate(self, seconds: float) -> float:
        """Count tokens per second over a window."""
        before, start = self.tokens, time.perf_counter()
        await asyncio.sleep(seconds)
        return (self.tokens - before) / (time.perf_counter() - start)


async def fuse_on(client: AsyncTurretClient, names: list[str], done: list[float]) -> None:
    """Fuse without a pause; ``done`` gets the seconds of every fusion."""
    mix = [AdapterWeight(name, 1.0 / _FUSED) for name in names[:_FUSED]]
    for number in itertools.count():
        start = time.perf_counter()
        name = f"fused-{len(done)}-{number}"
        await client.adapters.fuse(name, mix, combination="svd", rank=_RANK)
        done.append(time.perf_counter() - start)
        await client.adapters.unload(name)


async def measure(
    address: str, names: list[str], args: argparse.Namespace
) -> tuple[list[float], list[float], list[float]]:
    """Rates without and with a fusion running, and the seconds that finished fusions took."""
    async with AsyncTurretClient(address) as client:
        traffic = Traffic(client, names)
        users = [asyncio.create_task(traffic.run(number)) for number in range(args.batch)]
        await asyncio.sleep(args.window)
        plain: list[float] = []
        beside: list[float] = []
        done: list[float] = []
        for _ in range(args.pairs):
            plain.append(await traffic.rate(args.window))
            fusing = asyncio.create_task(fuse_on(client, names, done))
            await asyncio.sleep(0.2)
            beside.append(await traffic.rate(args.window))
            assert not fusing.done(), fusing
            fusing.cancel()
            # A cancelled fusion ends after the module it is working on.
            await asyncio.sleep(1.0)
        for user in users:
            user.cancel()
        await asyncio.gather(*users, return_exceptions=True)
        return plain, beside, done


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    console = make_console()
    load = require_idle(console, args.force)
    from transformers import AutoConfig

    model = resolve_model(None, default_cache_dir())
    arch = read_arch(AutoConfig.from_pretrained(model.files))
    with tempfile.TemporaryDirectory(prefix="turret-bench-") as scratch:
        root = Path(scratch) / "adapters"
        names = write_random_loras(root, args.batch, arch=arch, base_model=model.name, rank=_RANK)
        flags = ["--adapter-root", str(root), "--state-dir", str(Path(scratch) / "state")]
        for name in names:
            flags += ["--preload", f"{name}={name}"]
        with ServerProcess(flags) as server:
            server.wait()
            plain, beside, done = asyncio.run(measure(server.address, names, args))
    shares = [two / one for one, two in zip(plain, beside, strict=True)]
    rows = [
        {
            "windows": kind,
            "tokens/s": f"{statistics.median(rates):.0f}",
            "each": " ".join(f"{rate:.0f}" for rate in rates),
        }
        for kind, rates in (("without", plain), ("fusing", beside))
    ]
    threads = os.environ.get("OMP_NUM_THREADS", "one a core")
    print_rows(console, f"Decoding beside a fusion (threads: {threads})", rows)
    share = statistics.median(shares)
    console.print(
        f"rate beside a fusion, of that without: {share:.3f} (median of pairs);"
        f" {len(done)} fusions done"
    )
    if not args.no_save:
        values = {"plain": plain, "fusing": beside, "share": share, "fusion_seconds": done}
        row = describe() | {"bench": "fusing", "forced": args.force, "load_before": round(load, 3)}
        sizes = {"batch": args.batch, "rank": _RANK, "fused": _FUSED, "model": model.name}
        console.print(
            f"results added to {append_rows([row | {'scenario': sizes, 'values': values}])}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
