"""Variants of a run that are trained together in one process, compared with one of them alone.

    python bench/sweeps.py [--steps 6] [--batch-size 4] [--rounds 3]

The variants are LoRAs on all linear modules of the bundled model, trained on the same examples of
``examples/data/headline.train.jsonl`` by the engine of a server. The first row trains one of them
with transformers and PEFT instead. Each case runs in a process of its own, and is measured after
its first step. The processor time is that of all threads.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.report import make_console, print_rows

from turret.server.basics.machine import use_threads
from turret.training.settings.variants import read_variants

DATA = Path(__file__).parents[1] / "examples" / "data" / "headline.train.jsonl"
CASES = {
    "one, with PEFT": "method.rank=[8]",
    "one": "method.rank=[8]",
    "5 ranks": "method.rank=2,4,8,16,32",
    "5 learning rates": "optimizer.learning_rate=1e-4,3e-4,1e-3,2e-3,3e-3",
}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Train a case in this process; returns its tokens, its times and its peak memory."""
    use_threads(None, is_background=True)
    from turret.training.engine import PeftEngine
    from turret.training.in_process_engine import in_process_engines
    from turret.training.settings.resolve import resolve
    from turret.training.trainer import make_stream

    with tempfile.TemporaryDirectory() as folder, in_process_engines() as open_engine:
        path = Path(folder) / "train.toml"
        run = f"steps = {args.steps}\nbatch_size = {args.batch_size}"
        path.write_text(f'[data]\ntrain = "{DATA}"\nvalidation_fraction = 0.02\n[run]\n{run}\n')
        variants = read_variants(path, [CASES[args.case]])
        resolved = [resolve(variant.config, path.parent) for variant in variants]
        opened = PeftEngine if args.case.endswith("PEFT") else open_engine
        engines = [opened(each) for each in resolved]
        stream = make_stream(resolved[0])
        batches = [stream.rows(step) for step in range(args.steps + 1)]

        def train(engine: Any, batches: Sequence[Any]) -> None:
            for rows in batches:
                engine.backward([rows])
                engine.step(1e-3)

        with ThreadPoolExecutor(len(engines)) as pool:
            list(pool.map(lambda engine: train(engine, batches[:1]), engines))
            began, used = time.perf_counter(), time.process_time()
            list(pool.map(lambda engine: train(engine, batches[1:]), engines))
            elapsed, used = time.perf_counter() - began, time.process_time() - used
        for engine in engines:
            engine.close()
    tokens = sum(len(each.tokens) for rows in batches[1:] for row in rows for each in row)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"tokens": tokens * len(engines), "elapsed": elapsed, "used": used, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a sweep with one run.")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(args)))
        return
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(args.rounds):
        for case, rounds in found.items():
            command = [sys.executable, __file__, "--case", case]
            command += ["--steps", str(args.steps), "--batch-size", str(args.batch_size)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            rounds.append(json.loads(done.stdout))
    medians = {
        case: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for case, rounds in found.items()
    }
    one = medians["one"]
    rows = [
        {
            "variants": case,
            "processor time": f"{each['used']:.1f} s",
            "of one": f"{each['used'] / one['used']:.2f}",
            "elapsed": f"{each['elapsed']:.1f} s",
            "tokens per processor second": f"{each['tokens'] / each['used']:.0f}",
            "peak": f"{each['peak']:.0f} MiB",
        }
        for case, each in medians.items()
    ]
    print_rows(make_console(), "sweeps", rows)


if __name__ == "__main__":
    main()
