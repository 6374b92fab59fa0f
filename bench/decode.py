"""Decode speed, start-up time and memory of a real server process, seen by a real client.

    python bench/decode.py [--repeats 5] [--only TEXT] [--force]

Every round runs every case once, so that a drift of the machine affects all cases alike; the table
shows medians over the rounds. "of floor" is the time per token of all sequences, relative to the
time for reading the bytes of a step once at the rate measured before the server starts. Before the
measurement, requests in a mixed batch must give the same tokens as alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from common.adapters import (
    row_norms,
    write_default_methods,
    write_random_loras,
    write_random_methods,
)
from common.batch import BatchTiming, send_batch
from common.floor import read_bandwidth, step_bytes
from common.machine import CpuMeter, describe, require_idle
from common.prompts import PromptSource
from common.report import append_rows, make_console, print_rows
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress

from turret.clients.client import TurretClient
from turret.server.log import progress_bar
from turret.server.models.decoding.arch import Arch
from turret.server.models.families import read_arch
from turret.server.models.model_source import resolve_model
from turret.server.models.sources.check import default_cache_dir
from turret.server.server_process import ServerProcess, ServerProcessError

EXIT_WRONG = 4
# Number of requests whose tokens are compared with those that they get alone.
_CHECKED = 4
_WARM_UP_TOKENS = 8


class WrongTokensError(Exception):
    """The server computes wrong tokens, so its speed is meaningless."""


@dataclass(slots=True)
class Case:
    """One scenario and the results of its rounds."""

    name: str
    adapters: list[str | None]
    loras: int | None = None  # distinct LoRAs; None: other methods, whose bytes are not counted
    timings: list[BatchTiming] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)

    def median(self, of: Callable[[BatchTiming], float]) -> float:
        return statistics.median(of(timing) for timing in self.timings)

    def values(self) -> dict[str, Any]:
        """The values in a row of the results; rates in tokens/s, times in seconds."""
        return {
            "decode_tokens_per_second": round(self.median(lambda t: t.decode_rate), 1),
            "decode_tokens_per_second_all": [round(t.decode_rate, 1) for t in self.timings],
            "late_tokens_per_second": round(self.median(lambda t: t.late_rate), 1),
            "first_token_seconds": round(self.median(lambda t: t.first_seconds), 4),
            "mean_first_token_seconds": round(self.median(lambda t: t.mean_first_seconds), 4),
            "total_seconds": round(self.median(lambda t: t.total_seconds), 4),
            "server_decode_step_ms": round(statistics.median(self.step_ms), 3),
            "foreign_cpu_share": round(max(self.foreign), 3),
        }


def make_cases(loras: list[str], mixed: list[str], others: list[str], only: str = "") -> list[Case]:
    """The cases for a batch with one request per adapter of each kind.

    Returns the cases with ``only`` in their names, and the cases of the base for comparison.
    """
    batch, first = len(loras), loras[0]
    cases = [
        Case("base, 1 request", [None], 0),
        Case(f"base, {batch} requests", [None] * batch, 0),
        Case("one adapter, 1 request", [first], 1),
        Case(f"same adapter, {batch} requests", [first] * batch, 1),
        Case(f"{batch} adapters, {batch} requests", list(loras), batch),
        Case(f"mixed methods, {batch} requests", list(mixed)),
        Case(f"default sizes, {batch} requests", list(others)),
    ]
    chosen = [case for case in cases if only in case.name]
    sizes = {len(case.adapters) for case in chosen}
    return [
        case
        for case in cases
        if case in chosen or (case.adapters[0] is None and len(case.adapters) in sizes)
    ]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: the bundled model")
    for flag, default, text in (
        ("--batch", 16, "requests at once, and different adapters"),
        ("--rank", 16, "rank of the LoRAs, on all seven projections"),
        ("--mixed-rank", 8, "rank, or soft tokens, of the adapters of mixed methods"),
        ("--prompt-tokens", 64, "length of every prompt"),
        ("--new-tokens", 64, "tokens generated per request"),
        ("--repeats", 5, "rounds; the median counts"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="run only cases with TEXT in their names, and the base",
    )
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--no-save", action="store_true", help="do not store the results")
    args = parser.parse_args(argv)
    counts = (args.batch, args.rank, args.mixed_rank, args.repeats)
    if min(counts) < 1 or args.new_tokens < 2:
        parser.error("counts must be at least 1, and --new-tokens at least 2")
    return args


def decode_steps(metrics_address: str) -> tuple[float, int]:
    """The seconds spent in pure decode steps and the number of steps, from the server's metrics."""
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("phase") == "decode"
    }
    total = values.get("turret_step_seconds_sum", 0.0)
    return total, int(values.get("turret_step_seconds_count", 0))


def run_round(server: ServerProcess, source: PromptSource, case: Case, new_tokens: int) -> None:
    """Run a case once, and record its times.

    Raises:
        ValueError: A prompt was found in the prefix cache, which would shorten the time to the
            first token.
    """
    prompts = source.take(len(case.adapters))
    seconds, steps = decode_steps(server.metrics_address)
    meter = CpuMeter(server.process.pid)
    answers = send_batch(server.address, prompts, case.adapters, new_tokens)
    case.foreign.append(meter.foreign_share())
    if any(answer.cached_tokens for answer in answers):
        raise ValueError(f"{case.name}: prompt tokens came from the prefix cache")
    case.timings.append(BatchTiming.of(answers))
    seconds_after, steps_after = decode_steps(server.metrics_address)
    case.step_ms.append(1e3 * (seconds_after - seconds) / max(steps_after - steps, 1))


def tokens_are_right(
    server: ServerProcess, source: PromptSource, names: list[str], new_tokens: int
) -> bool:
    """Whether requests get the same tokens in a mixed batch as alone.

    Most of them must also differ from the base model's tokens; otherwise, no adapter was applied.
    """
    prompts = source.take(1) * len(names)
    mixed = send_batch(server.address, prompts, names, new_tokens)
    for number in range(min(_CHECKED, len(names))):
        alone = send_batch(server.address, prompts[:1], [names[number]], new_tokens)
        if alone[0].token_ids != mixed[number].token_ids:
            return False
    base = send_batch(server.address, prompts[:1], [None], new_tokens)
    same_as_base = sum(answer.token_ids == base[0].token_ids for answer in mixed)
    return 2 * same_as_base <= len(names)


def measure_start(args: argparse.Namespace, root: Path) -> tuple[ServerProcess, float]:
    """Start the server; returns it and the seconds until its first answer."""
    # Measure the cost of a step; speculation would change the number of steps.
    flags = ["--adapter-root", str(root), "--speculation", "off"]
    flags += ["--max-num-seqs", str(max(64, args.batch))]
    flags += ["--max-rank", str(max(128, args.rank))]
    if args.model is not None:
        flags += ["--model", str(args.model)]
    start = time.perf_counter()
    server = ServerProcess(flags)
    try:
        server.wait()
        with TurretClient(server.address) as client:
            client.chat("Hello", temperature=0.0, max_tokens=1)
        return server, time.perf_counter() - start
    except BaseException:
        server.stop()
        raise


def measure(
    args: argparse.Namespace, console: Console, root: Path, cases: list[Case]
) -> dict[str, Any]:
    """Run the cases; returns the results for the server as a whole.

    Raises:
        WrongTokensError: A mixed batch changes tokens, so nothing was measured.
        ServerProcessError: The server did not start.
    """
    server, start_seconds = measure_start(args, root)
    with server, TurretClient(server.address) as client, Progress(console=console) as bar:
        process = psutil.Process(server.process.pid)
        idle_bytes = process.memory_info().rss
        distinct = [c for c in cases if len(set(c.adapters)) == args.batch and args.batch > 1]
        for name in dict.fromkeys(name for case in cases for name in case.adapters if name):
            client.adapters.load(name, name)
        source = PromptSource(client, args.prompt_tokens)
        for case in distinct:
            names = [name for name in case.adapters if name is not None]
            if not tokens_are_right(server, source, names, args.new_tokens):
                raise WrongTokensError(
                    f"{case.name}: a mixed batch does not give its requests the tokens they get"
                    " alone"
                )
        task = bar.add_task("Measuring", total=args.repeats * len(cases))
        for case in cases:
            prompts = source.take(len(case.adapters))
            send_batch(server.address, prompts, case.adapters, _WARM_UP_TOKENS)
        for _ in range(args.repeats):
            for case in cases:
                run_round(server, source, case, args.new_tokens)
                bar.advance(task)
        whole = {
            "cold_start_seconds": round(start_seconds, 2),
            "rss_mib_before_adapters": round(idle_bytes / 2**20),
            "rss_mib": round(process.memory_info().rss / 2**20),
        }
    return whole


def floor_seconds(
    args: argparse.Namespace, arch: Arch, case: Case, bandwidth: float
) -> float | None:
    """The time to read the bytes of a step with half of each answer generated; None if unknown."""
    if case.loras is None:
        return None
    parts = step_bytes(
        arch,
        requests=len(case.adapters),
        loras=case.loras,
        rank=args.rank,
        context=args.prompt_tokens + args.new_tokens // 2,
    )
    return sum(parts.values()) / bandwidth


def show(
    console: Console, cases: list[Case], floors: list[float | None], whole: dict[str, Any]
) -> None:
    base = {
        len(c.adapters): c.median(lambda t: t.decode_rate) for c in cases if c.adapters[0] is None
    }
    rows = []
    for case, floor in zip(cases, floors, strict=True):
        rate = case.median(lambda t: t.decode_rate)
        taken = len(case.adapters) / rate
        rates = [t.decode_rate for t in case.timings]
        rows.append(
            {
                "case": case.name,
                "tokens/s": f"{rate:.1f}",
                "range": f"{min(rates):.0f}-{max(rates):.0f}",
                "of base": f"{rate / base[len(case.adapters)]:.2f}",
                "of floor": f"{taken / floor:.2f}" if floor else "",
                "first, s": f"{case.median(lambda t: t.mean_first_seconds):.3f}",
                "all first, s": f"{case.median(lambda t: t.first_seconds):.3f}",
                "step, ms": f"{statistics.median(case.step_ms):.2f}",
                "others": f"{max(case.foreign):.0%}",
            }
        )
    print_rows(
        console,
        "Decode, aggregate over the batch; medians. First: time to the first token, mean and last",
        rows,
    )
    console.print(
        f"cold start to first answer {whole['cold_start_seconds']} s (weights cached as NF4); "
        f"server memory {whole['rss_mib']} MiB with the adapters, "
        f"{whole['rss_mib_before_adapters']} MiB before; memory read at "
        f"{whole['read_bytes_per_second'] / 1e9:.1f} GB/s"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    console = make_console()
    load = require_idle(console, args.force)
    with progress_bar() as progress:
        model = resolve_model(args.model, default_cache_dir(), progress)
    from transformers import AutoConfig

    arch = read_arch(AutoConfig.from_pretrained(model.files))
    with tempfile.TemporaryDirectory(prefix="turret-bench-") as folder:
        root = Path(folder)
        like = {"arch": arch, "base_model": model.name}
        loras = write_random_loras(root, args.batch, rank=args.rank, **like)
        mixed = write_random_methods(
            root, args.batch, rank=args.mixed_rank, norms=row_norms(model), **like
        )
        others = write_default_methods(root, args.batch, **like)
        cases = make_cases(loras, mixed, others, args.only)
        if not cases:
            console.print(f"no case is named like {args.only!r}", markup=False)
            return 2
        bandwidth = read_bandwidth()
        try:
            whole = measure(args, console, root, cases)
        except WrongTokensError as error:
            console.print(f"nothing measured: {error}")
            return EXIT_WRONG
        except ServerProcessError as error:
            console.print(f"nothing measured: {error}", markup=False)
            return 1
    whole["read_bytes_per_second"] = round(bandwidth)
    floors = [floor_seconds(args, arch, case, bandwidth) for case in cases]
    show(console, cases, floors, whole)
    if not args.no_save:
        common = describe() | {"forced": args.force, "load_before": round(load, 3)}
        sizes = {
            "model": model.name,
            "rank": args.rank,
            "mixed_rank": args.mixed_rank,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "repeats": args.repeats,
        }
        rows = [
            common
            | {
                "bench": "decode",
                "scenario": sizes | {"name": case.name, "batch": len(case.adapters)},
                "values": case.values()
                | ({} if floor is None else {"floor_ms": round(1e3 * floor, 3)}),
            }
            for case, floor in zip(cases, floors, strict=True)
        ]
        server_scenario = sizes | {"name": "server", "adapters": args.batch}
        rows.append(common | {"bench": "decode", "scenario": server_scenario, "values": whole})
        console.print(f"results added to {append_rows(rows)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
