"""Decode speed, start-up time and memory of a real server process, seen by a real client.

    python bench/decode.py [--repeats 5] [--only TEXT] [--force]

Every round runs every case once, so that a drift of the machine affects all cases alike; the table
shows medians over the rounds. "of floor" is the time per token of all sequences, relative to the
time for reading the bytes of a step once at the rate measured before the server starts. Before the
measurement, requests in a mixed batch must give the same tokens as alone.

No constrained answer can end before the last measured token. A counted expression (``x{2000}``) has
a state for every count, so that no mask is reused. Constraints are compiled before the measurement,
as for every request but a client's first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
from common.adapters import numbered
from common.floor import read_bandwidth, step_bytes
from common.machine import CpuMeter
from common.report import print_rows
from common.requests import BatchTiming, PromptSource, send_batch
from common.session import Session, make_parser, session
from rich.progress import Progress

from turret.clients.client import TurretClient
from turret.clients.requests import GenerateOptions

EXIT_WRONG = 4
# Number of requests whose tokens are compared with those that they get alone.
_CHECKED = 4
_WARM_UP_TOKENS = 8
# The length that constraints require, in items or characters.
_LENGTH = 2000


class WrongTokensError(Exception):
    """The server computes wrong tokens, so its speed is meaningless."""


@dataclass(slots=True)
class Case:
    """One scenario and the results of its rounds."""

    name: str
    adapters: list[str | None]
    loras: int | None = None  # distinct LoRAs; None: other methods, whose bytes are not counted
    options: list[GenerateOptions] | None = None
    timings: list[BatchTiming] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)

    def median(self, of: Callable[[BatchTiming], float]) -> float:
        return statistics.median(of(timing) for timing in self.timings)

    def values(self) -> dict[str, Any]:
        """The values in a row of the results; rates in tokens/s, times in seconds."""
        return {
            "decode_tokens_per_second": round(self.median(lambda t: t.decode_rate), 1),
            "decode_tokens_per_second_all": [round(t.decode_rate, 1) for t in self.timings],
            "first_token_seconds": round(self.median(lambda t: t.first_seconds), 4),
            "mean_first_token_seconds": round(self.median(lambda t: t.mean_first_seconds), 4),
            "total_seconds": round(self.median(lambda t: t.total_seconds), 4),
            "foreign_cpu_share": round(max(self.foreign), 3),
        }


def constraints(batch: int) -> dict[str, list[GenerateOptions]]:
    """The options of each request, by the kind of constraint."""
    properties = {"name": {"type": "string"}, "age": {"type": "integer"}}
    person = {"type": "object", "properties": properties, "required": ["name", "age"]}
    people = {"type": "array", "minItems": _LENGTH, "items": person}
    numbers = range(batch)
    return {
        "JSON schema": [
            {
                "json_schema": {
                    "type": "object",
                    "properties": {f"people_{n}": people},
                    "required": [f"people_{n}"],
                }
            }
            for n in numbers
        ],
        "regular expression": [{"regex": f"[a-zA-Z ,.{n}]+"} for n in numbers],
        "counted expression": [{"regex": f"[a-zA-Z ,.{n}]{{{_LENGTH}}}"} for n in numbers],
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
    cases += [
        Case(f"{kind}, {batch} requests", [None] * batch, 0, options)
        for kind, options in constraints(batch).items()
    ]
    chosen = [case for case in cases if only in case.name]
    sizes = {len(case.adapters) for case in chosen}
    return [
        case
        for case in cases
        if case in chosen or (case.name.startswith("base,") and len(case.adapters) in sizes)
    ]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, 5)
    for flag, default, text in (
        ("--batch", 16, "requests at once, and different adapters, at most 64"),
        ("--rank", 16, "rank of the LoRAs, on all seven projections, at most 128"),
        ("--mixed-rank", 8, "rank, or soft tokens, of the adapters of mixed methods"),
        ("--prompt-tokens", 64, "length of every prompt"),
        ("--new-tokens", 64, "tokens generated per request"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{text} ({default})")
    args = parser.parse_args(argv)
    counts = (args.batch, args.rank, args.mixed_rank, args.repeats)
    if min(counts) < 1 or args.new_tokens < 2:
        parser.error("counts must be at least 1, and --new-tokens at least 2")
    return args


def tokens_are_right(
    address: str, source: PromptSource, names: Sequence[str | None], new_tokens: int
) -> bool:
    """Whether requests get the same tokens in a mixed batch as alone.

    Most of them must also differ from the base model's tokens; otherwise, no adapter was applied.
    """
    prompts = source.take(1) * len(names)
    mixed = send_batch(address, prompts, names, new_tokens)
    for name, answer in list(zip(names, mixed, strict=True))[:_CHECKED]:
        alone = send_batch(address, prompts[:1], [name], new_tokens)
        if alone[0].token_ids != answer.token_ids:
            return False
    base = send_batch(address, prompts[:1], [None], new_tokens)
    same_as_base = sum(answer.token_ids == base[0].token_ids for answer in mixed)
    return 2 * same_as_base <= len(names)


def measure(run: Session, cases: list[Case]) -> dict[str, Any]:
    """Run the cases; returns the results for the server as a whole.

    Raises:
        WrongTokensError: A mixed batch changes tokens, so nothing was measured.
        ValueError: A prompt was found in the prefix cache, which would shorten the time to the
            first token.
    """
    args, start = run.args, time.perf_counter()
    with run.serving([]) as server, TurretClient(server.address) as client:
        client.chat("Hello", temperature=0.0, max_tokens=1)
        start_seconds = time.perf_counter() - start
        process = psutil.Process(server.process.pid)
        idle_bytes = process.memory_info().rss
        for name in dict.fromkeys(name for case in cases for name in case.adapters if name):
            client.adapters.load(name, name)
        source = PromptSource(client, args.prompt_tokens)
        for case in cases:
            prompts = source.take(len(case.adapters))
            send_batch(server.address, prompts, case.adapters, _WARM_UP_TOKENS, case.options)
            is_distinct = len(set(case.adapters)) == args.batch > 1
            if is_distinct and not tokens_are_right(
                server.address, source, case.adapters, args.new_tokens
            ):
                raise WrongTokensError(f"{case.name}: batching changes the tokens")
        with Progress(console=run.console) as bar:
            task = bar.add_task("Measuring", total=args.repeats * len(cases))
            for _ in range(args.repeats):
                for case in cases:
                    prompts, meter = source.take(len(case.adapters)), CpuMeter(process.pid)
                    answers = send_batch(
                        server.address, prompts, case.adapters, args.new_tokens, case.options
                    )
                    case.foreign.append(meter.foreign_share())
                    if any(answer.cached_tokens for answer in answers):
                        raise ValueError(f"{case.name}: prompt tokens came from the prefix cache")
                    case.timings.append(BatchTiming.of(answers))
                    bar.advance(task)
        return {
            "cold_start_seconds": round(start_seconds, 2),
            "rss_mib_before_adapters": round(idle_bytes / 2**20),
            "rss_mib": round(process.memory_info().rss / 2**20),
        }


def floor_seconds(run: Session, case: Case, bandwidth: float) -> float | None:
    """The time to read the bytes of a step with half of each answer generated; None if unknown."""
    if case.loras is None:
        return None
    parts = step_bytes(
        run.base.arch,
        requests=len(case.adapters),
        loras=case.loras,
        rank=run.args.rank,
        context=run.args.prompt_tokens + run.args.new_tokens // 2,
    )
    return sum(parts.values()) / bandwidth


def show(run: Session, cases: list[Case], floors: list[float | None], whole: dict) -> None:
    base = {
        len(c.adapters): c.median(lambda t: t.decode_rate)
        for c in cases
        if c.name.startswith("base,")
    }
    rows = []
    for case, floor in zip(cases, floors, strict=True):
        rate = case.median(lambda t: t.decode_rate)
        rates = [t.decode_rate for t in case.timings]
        rows.append(
            {
                "case": case.name,
                "tokens/s": f"{rate:.1f}",
                "range": f"{min(rates):.0f}-{max(rates):.0f}",
                "of base": f"{rate / base[len(case.adapters)]:.2f}",
                "of floor": f"{len(case.adapters) / rate / floor:.2f}" if floor else "",
                "first, s": f"{case.median(lambda t: t.mean_first_seconds):.3f}",
                "all first, s": f"{case.median(lambda t: t.first_seconds):.3f}",
                "others": f"{max(case.foreign):.0%}",
            }
        )
    title = "Decode, medians. First: time to the first token, mean and last of the batch"
    print_rows(run.console, title, rows)
    run.console.print(
        f"server start to first answer {whole['cold_start_seconds']} s (weights cached as NF4); "
        f"server memory {whole['rss_mib']} MiB with the adapters, "
        f"{whole['rss_mib_before_adapters']} MiB before; memory read at "
        f"{whole['read_bytes_per_second'] / 1e9:.1f} GB/s"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with session("decode", args) as run:
        loras, mixed, others = (numbered(each, args.batch) for each in ("lora", "mixed", "default"))
        cases = make_cases(loras, mixed, others, args.only)
        if not cases:
            run.console.print(f"no case has {args.only!r} in its name", markup=False)
            return 2
        wanted = {name for case in cases for name in case.adapters}
        if wanted.intersection(loras):
            run.write.loras(args.batch, args.rank)
        if wanted.intersection(mixed):
            run.write.mixed(args.batch, args.mixed_rank)
        if wanted.intersection(others):
            run.write.defaults(args.batch)
        bandwidth = read_bandwidth()
        try:
            whole = measure(run, cases)
        except WrongTokensError as error:
            run.console.print(f"nothing measured: {error}")
            return EXIT_WRONG
        whole["read_bytes_per_second"] = round(bandwidth)
        floors = [floor_seconds(run, case, bandwidth) for case in cases]
        show(run, cases, floors, whole)
        names = ("rank", "mixed_rank", "prompt_tokens", "new_tokens", "repeats")
        sizes = {name: getattr(args, name) for name in names}
        rows = [
            (
                sizes | {"name": case.name, "batch": len(case.adapters)},
                case.values() | ({} if floor is None else {"floor_ms": round(1e3 * floor, 3)}),
            )
            for case, floor in zip(cases, floors, strict=True)
        ]
        run.save([*rows, (sizes | {"name": "server"}, whole)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
