"""The time of each part of a decode step, and the minimum time to read its bytes.

    python bench/steps.py [--batch 16] [--steps 40] [--only mixed]

The engine runs in this process, with timers around the parts of a step. Compared with a server, a
step takes longer because of the timers (about a microsecond per call), and less because there is no
gRPC. ``bench/decode.py`` measures the rate for a client.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.adapters import (
    DEFAULT_METHODS,
    INVOCATION,
    row_norms,
    write_default_methods,
    write_random_loras,
    write_random_methods,
)
from common.floor import read_bandwidth, step_bytes
from common.machine import describe, require_idle
from common.report import append_rows, make_console, print_rows
from common.stopwatch import Part, Recorded, Stopwatch
from rich.console import Console

from turret.server.adapters.adapter import AdapterRef
from turret.server.basics.work import compute_on_this_thread
from turret.server.build import build_backend
from turret.server.config import AdapterConfig, Config, ModelConfig, SchedulerConfig
from turret.server.engine.engine import Engine
from turret.server.engine.loop import EngineLoop
from turret.server.engine.scheduling.request import Request, SamplingParams, StopConditions
from turret.server.metrics import Metrics
from turret.server.models.families import read_arch
from turret.server.models.model_source import resolve_model
from turret.server.models.sources.check import default_cache_dir

ENGINE = "engine"
REST = "all else"
# The innermost part counts: a part's time excludes the parts that it calls. If two entries have the
# same name, only one of them runs: the compiled or the torch formulation, the screened or the whole
# head.
PARTS = (
    Part("turret.server.models.weights.nf4:PackedLinear.__call__", "base matmuls"),
    Part("turret.server.adapters.device.cpu.store:CpuStep.project", "adapters"),
    Part("turret.server.adapters.device.reference:StepReference.project", "adapters"),
    Part("turret.server.models.decoding.cpu_layers:CpuLayerOps.attend", "attention"),
    Part("turret.server.models.decoding.layer_ops:LayerOps.attend", "attention"),
    Part("turret.server.models.decoding.cpu_layers:CpuLayerOps.add_rms_norm", "norms, residuals"),
    Part("turret.server.models.decoding.layer_ops:LayerOps.add_rms_norm", "norms, residuals"),
    Part("turret.server.models.decoding.cpu_layers:CpuLayerOps.gated_activation", "activation"),
    Part("turret.server.models.decoding.layer_ops:LayerOps.gated_activation", "activation"),
    Part("turret.server.adapters.device.reference:StepReference.apply", "operators by torch"),
    Part("turret.server.models.decoding.cpu_layers:run_layers", "all layers in one call"),
    Part("turret.server.models.decoding.decoder:Decoder.logits", "head"),
    Part("turret.server.models.decoding.decoder:LikeliestTokens.find", "head"),
    Part("turret.server.engine.step.sampler:Sampler.draw", "sampling"),
    Part("turret.server.engine.step.batch:BatchBuilder.build", "batch metadata"),
    Part("turret.server.engine.step.runner:Runner.run", REST),
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A batch, with the adapter of each request or None; the minimum time counts only ``loras``."""

    name: str
    adapters: list[str | None]
    loras: int = 0


def scenarios(names: list[str], mixed: list[str], others: list[str], only: str) -> list[Scenario]:
    """The scenarios with ``only`` in their names; those of a single method only by its name."""
    batch = len(names)
    found = [
        Scenario("base, 1", [None]),
        Scenario(f"base, {batch}", [None] * batch),
        Scenario("adapter, 1", [names[0]], loras=1),
        Scenario(f"same adapter, {batch}", [names[0]] * batch, loras=1),
        Scenario(f"{batch} adapters, {batch}", list(names), loras=batch),
        Scenario(f"mixed methods, {batch}", list(mixed)),
        Scenario(f"default sizes, {batch}", list(others)),
    ]
    for method in DEFAULT_METHODS if only else ():
        own = [name for name in others if name.endswith(f"-{method}")]
        of_one: list[str | None] = [own[i % len(own)] for i in range(batch)] if own else []
        found += [Scenario(f"{method}, {batch}", of_one)] if own else []
    return [
        scenario for scenario in found if any(part in scenario.name for part in only.split("|"))
    ]


async def decode(
    engine: Engine, scenario: Scenario, prompt_tokens: int, steps: int, watch: Stopwatch
) -> list[Recorded]:
    """Run one batch; returns the times of all pure decode steps of the whole batch."""
    recorded: list[Recorded] = []
    original: Any = EngineLoop._step
    step = watch.timed(ENGINE, original)
    batch = len(scenario.adapters)

    def record(self: EngineLoop) -> None:
        step(self)
        taken = watch.take()
        running = self._scheduler.running
        # Prefill is over once every sequence of the batch has a token. The step that produced the
        # last of these first tokens was still a prefill.
        is_decode = len(running) == batch and all(s.num_generated > 1 for s in running)
        if is_decode:
            recorded.append(taken)

    async def one(number: int, adapter: str | None) -> None:
        draw = random.Random(f"{scenario.name}/{number}/{time.time_ns()}")
        request = Request(
            request_id=f"{number}",
            prompt_token_ids=(
                *(draw.randrange(1000, 20000) for _ in range(prompt_tokens - 1)),
                INVOCATION,
            ),
            adapters=() if adapter is None else (AdapterRef(name=adapter),),
            sampling=SamplingParams(temperature=0.0),
            stop=StopConditions(max_tokens=steps + 2, ignore_eos=True),
        )
        async for _ in await engine.submit(request):
            pass

    EngineLoop._step = record
    try:
        await asyncio.gather(*(one(i, name) for i, name in enumerate(scenario.adapters)))
    finally:
        EngineLoop._step = original
    return recorded


def medians(recorded: list[Recorded]) -> Recorded:
    """The median milliseconds per part, over steps."""
    names = dict.fromkeys(name for entry in recorded for name in entry)
    return {
        name: 1e3 * statistics.median(entry.get(name, 0.0) for entry in recorded) for name in names
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: the bundled model")
    for flag, default in (
        ("--batch", 16),
        ("--rank", 16),
        ("--mixed-rank", 8),
        ("--prompt-tokens", 64),
        ("--steps", 40),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"default: {default}")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="run only cases with TEXT in their names (A|B: either)",
    )
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--no-save", action="store_true", help="do not store the results")
    return parser.parse_args(argv)


async def measure(args: argparse.Namespace, root: Path, cases: list[Scenario]) -> list[Recorded]:
    """The median milliseconds by part, for every case."""
    config = Config(
        model=ModelConfig(model=args.model),
        adapters=AdapterConfig(adapter_root=root, max_rank=max(128, args.rank)),
        scheduler=SchedulerConfig(max_num_seqs=max(64, args.batch), speculation="off"),
    )
    backend = build_backend(config, Metrics())
    engine, registry = backend.engine, backend.registry
    await engine.start()
    try:
        for name in {name for case in cases for name in case.adapters if name is not None}:
            registry.load(name, name)
        watch = Stopwatch()
        results = []
        for case in cases:
            # Packs the adapters and fills the caches of the matrix libraries.
            await decode(engine, case, args.prompt_tokens, 4, Stopwatch())
            with watch.watching(PARTS):
                recorded = await decode(engine, case, args.prompt_tokens, args.steps, watch)
            results.append(medians(recorded))
        return results
    finally:
        await engine.drain(0.0)
        backend.close()


def show(
    console: Console,
    cases: list[Scenario],
    results: list[Recorded],
    floors: list[Recorded],
    bandwidth: float,
) -> None:
    order = dict.fromkeys([*(part.name for part in PARTS), ENGINE])
    rows = []
    for name in order:
        row = {"part, ms a step": name}
        for case, result, floor in zip(cases, results, floors, strict=True):
            least = f" ({floor[name]:.2f})" if floor.get(name) else ""
            row[case.name] = f"{result.get(name, 0.0):.2f}{least}"
        rows.append(row)
    total = {"part, ms a step": "sum (and of the floors)"}
    for case, result, floor in zip(cases, results, floors, strict=True):
        total[case.name] = f"{sum(result.values()):.2f} ({sum(floor.values()):.2f})"
    title = (
        "One decode step, by part (in parentheses: reading the part's bytes once, at the "
        f"{bandwidth / 1e9:.1f} GB/s measured)"
    )
    print_rows(console, title, [*rows, total])


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    console = make_console()
    load = require_idle(console, args.force)
    from transformers import AutoConfig

    model = resolve_model(args.model, default_cache_dir())
    arch = read_arch(AutoConfig.from_pretrained(model.files))
    bandwidth = read_bandwidth()
    # As in a server, only the engine thread may have an OpenMP team from here on.
    compute_on_this_thread()
    with tempfile.TemporaryDirectory(prefix="turret-bench-") as folder:
        root = Path(folder)
        like = {"arch": arch, "base_model": model.name}
        loras = write_random_loras(root, args.batch, rank=args.rank, **like)
        mixed = write_random_methods(
            root, args.batch, rank=args.mixed_rank, norms=row_norms(model), **like
        )
        others = write_default_methods(root, args.batch, **like)
        cases = scenarios(loras, mixed, others, args.only)
        if not cases:
            console.print(f"no case is named like {args.only!r}", markup=False)
            return 2
        results = asyncio.run(measure(args, root, cases))
    context = args.prompt_tokens + args.steps // 2
    floors = [
        {
            name: 1e3 * count / bandwidth
            for name, count in step_bytes(
                arch,
                requests=len(case.adapters),
                loras=case.loras,
                rank=args.rank,
                context=context,
            ).items()
        }
        for case in cases
    ]
    show(console, cases, results, floors, bandwidth)
    if not args.no_save:
        common = describe() | {
            "bench": "steps",
            "forced": args.force,
            "load_before": round(load, 3),
        }
        sizes = {"model": model.name, "rank": args.rank, "prompt_tokens": args.prompt_tokens}
        rows = [
            common
            | {
                "scenario": sizes | {"name": case.name, "batch": len(case.adapters)},
                "values": {
                    "part_ms": {name: round(ms, 3) for name, ms in result.items()},
                    "floor_ms": {name: round(ms, 3) for name, ms in floor.items()},
                    "read_bytes_per_second": round(bandwidth),
                },
            }
            for case, result, floor in zip(cases, results, floors, strict=True)
        ]
        console.print(f"results added to {append_rows(rows)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
