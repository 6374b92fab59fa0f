"""What checking guessed tokens brings: the same requests on servers that guess and that do not.

    python bench/speculation.py [--repeats 3] [--only TEXT] [--force]

Three servers (``--speculation off``, ``prompt`` and ``auto``) get the same requests, one server
after the other in every round, so that a drift of the machine hits all alike; those that are not
asked sleep. Answers must have the same tokens everywhere, or nothing is reported. The examples'
held-out requests are asked once each, a part of them in each round, after a few of their training
sets': what ``auto`` remembers are answers to other requests. "nothing repeats" is drawn from the
base model at a temperature at which it does not; "copies" asks for what the prompt says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.machine import ROOT, CpuMeter, describe, require_idle
from common.report import append_rows, make_console, print_rows
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress

from turret.clients.aio import AsyncTurretClient
from turret.clients.client import TurretClient
from turret.server.server_process import ServerProcess

EXIT_WRONG = 4
OFF, SETTINGS = "off", ("off", "prompt", "auto")
# Number of requests before the first round, whose answers ``auto`` remembers.
WARM_UP = 16
_DATA = ROOT / "examples" / "data"
_COPIED = (
    "the {0} harbour opens at {1} and closes at {2}",
    "every {0} ticket costs {1} and is good for {2} days",
    "the museum of {0} shows {1} paintings on {2} floors",
    "the train from {0} takes {1} minutes and stops {2} times",
)
_PLACES = ("Lisbon", "Oslo", "Naples", "Tunis", "Leeds", "Austin", "Hobart", "Tampa", "Geneva")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: its prompt and how it is answered."""

    prompt: str
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Round:
    """The result of one round of a case on one server.

    Attributes:
        tokens_per_second: Of all its answers, prompts included in the time.
        draft: Tokens that were guessed.
        accepted: Those that were right.
        tokens: Of the answers.
    """

    tokens_per_second: float
    draft: int
    accepted: int
    tokens: int


@dataclass(slots=True)
class Case:
    """Requests of one kind, with a fixed number at once.

    Attributes:
        name: Of the kind, and how many at once.
        adapter: Or None for the base model.
        at_once: Requests in flight.
        rounds: The requests of each round; the first is not counted.
        results: By setting.
    """

    name: str
    adapter: str | None
    at_once: int
    rounds: list[list[Asked]]
    results: dict[str, list[Round]] = field(default_factory=dict)

    def rate(self, setting: str) -> float:
        return statistics.median(r.tokens_per_second for r in self.results[setting])

    def gain(self, setting: str) -> float:
        """Median over the rounds of the rate against that of the same round without guesses."""
        pairs = zip(self.results[setting], self.results[OFF], strict=True)
        return statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs)

    def values(self) -> dict[str, Any]:
        """The values of a row of the results."""
        found: dict[str, Any] = {}
        for setting, rounds in self.results.items():
            draft, accepted = sum(r.draft for r in rounds), sum(r.accepted for r in rounds)
            found[setting] = {
                "tokens_per_second": round(self.rate(setting), 1),
                "tokens_per_second_all": [round(r.tokens_per_second, 1) for r in rounds],
                "gain": round(self.gain(setting), 3),
                "tokens": sum(r.tokens for r in rounds),
                "draft_tokens": draft,
                "accepted_tokens": accepted,
            }
        return found


def parts(items: Sequence[Asked], count: int) -> list[list[Asked]]:
    """``count`` parts of equal length; what is left over is left out."""
    size = len(items) // count
    return [list(items[i * size : (i + 1) * size]) for i in range(count)]


def example_rounds(name: str, repeats: int) -> list[list[Asked]]:
    """Training prompts of an example's adapter to warm up, then its held-out ones, divided."""
    greedy = {"temperature": 0.0, "max_tokens": 96}

    def read(path: str) -> list[Asked]:
        lines = map(json.loads, (_DATA / path).read_text(encoding="utf-8").splitlines())
        return [Asked(line["prompt"], greedy) for line in lines]

    is_own = {"json": "JSON with", "sql": "SQL for"}[name]
    training = [a for a in read("json-sql.train.jsonl") if a.prompt.startswith(is_own)]
    return [training[:WARM_UP], *parts(read(f"{name}.test.jsonl"), repeats)]


def drawn_rounds(repeats: int, per_round: int) -> list[list[Asked]]:
    """Texts that repeat nothing: the base model's at a high temperature, a seed each."""
    seeds = itertools.count(1)
    return [
        [
            Asked(
                f"Write about {_PLACES[i % len(_PLACES)]}.",
                {
                    "temperature": 1.3,
                    "top_p": 0.95,
                    "seed": next(seeds),
                    "max_tokens": 96,
                    "ignore_eos": True,
                },
            )
            for i in range(per_round)
        ]
        for _ in range(repeats + 1)
    ]


def copied_rounds(repeats: int, per_round: int) -> list[list[Asked]]:
    """Texts that the answer repeats: a list of facts, to be written out once more."""
    numbers = itertools.count(7)

    def text() -> str:
        facts = [
            line.format(_PLACES[next(numbers) % len(_PLACES)], next(numbers), next(numbers))
            for line in _COPIED
        ]
        return f"Repeat this text word for word: {'; '.join(facts)}."

    options = {"temperature": 0.0, "max_tokens": 96}
    return [[Asked(text(), options) for _ in range(per_round)] for _ in range(repeats + 1)]


def make_cases(repeats: int, only: str) -> list[Case]:
    """Each kind with one request at a time and with eight."""
    kinds = {
        "json": ("json", example_rounds("json", repeats)),
        "sql": ("sql", example_rounds("sql", repeats)),
        "copies": (None, copied_rounds(repeats, 8)),
        "nothing repeats": (None, drawn_rounds(repeats, 8)),
    }
    return [
        Case(f"{name}, {at_once} at once", adapter, at_once, rounds)
        for name, (adapter, rounds) in kinds.items()
        for at_once in (1, 8)
        if only in f"{name}, {at_once} at once"
    ]


def draft_counts(server: ServerProcess) -> tuple[int, int]:
    """Tokens that the server has guessed, and that were right."""
    url = f"http://{server.metrics_address}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    values = {sample.name: sample.value for family in families for sample in family.samples}
    prefix = "turret_spec_decode_num_"
    kinds = ("draft", "accepted")
    draft, accepted = (int(values[f"{prefix}{kind}_tokens_total"]) for kind in kinds)
    return draft, accepted


def ask(server: ServerProcess, case: Case, number: int) -> tuple[list[tuple[int, ...]], float]:
    """The answers of a round, and the seconds they took together."""

    async def one(client: AsyncTurretClient, asked: Asked) -> tuple[int, ...]:
        adapters = () if case.adapter is None else case.adapter
        answer = await client.chat(asked.prompt, adapters=adapters, token_ids=True, **asked.options)
        return tuple(answer.token_ids)

    async def all_of_them() -> tuple[list[tuple[int, ...]], float]:
        async with AsyncTurretClient(server.address) as client:
            # Connect first, so that the time does not include it.
            await client.get_model()
            places = asyncio.Semaphore(case.at_once)

            async def in_turn(asked: Asked) -> tuple[int, ...]:
                async with places:
                    return await one(client, asked)

            start = time.perf_counter()
            found = await asyncio.gather(*map(in_turn, case.rounds[number]))
            return list(found), time.perf_counter() - start

    return asyncio.run(all_of_them())


def run_round(servers: dict[str, ServerProcess], case: Case, number: int) -> bool:
    """Ask all servers; whether they gave the same tokens."""
    answers = {}
    for setting, server in servers.items():
        before = draft_counts(server)
        answers[setting], seconds = ask(server, case, number)
        after = draft_counts(server)
        tokens = sum(map(len, answers[setting]))
        if number:
            result = Round(tokens / seconds, after[0] - before[0], after[1] - before[1], tokens)
            case.results.setdefault(setting, []).append(result)
    return all(found == answers[OFF] for found in answers.values())


@contextlib.contextmanager
def started() -> Iterator[dict[str, ServerProcess]]:
    """A server of each setting, with the adapters."""
    root = ROOT / "examples" / "adapters"
    with contextlib.ExitStack() as stack:
        servers = {}
        for setting in SETTINGS:
            flags = ["--adapter-root", str(root), "--speculation", setting]
            servers[setting] = server = stack.enter_context(ServerProcess(flags))
            server.wait()
            with TurretClient(server.address) as client:
                for name in ("json", "sql"):
                    client.adapters.load(name, name)
        yield servers


def show(console: Console, cases: Sequence[Case]) -> None:
    rows = []
    for case in cases:
        row = {"case": case.name}
        for setting in SETTINGS:
            values = case.values()[setting]
            row[f"{setting}, tokens/s"] = f"{values['tokens_per_second']:.1f}"
            if setting != OFF:
                draft, right = values["draft_tokens"], values["accepted_tokens"]
                row[f"{setting}, gain"] = f"{values['gain']:.2f}"
                row[f"{setting}, right of guessed"] = f"{right} of {draft}"
        rows.append(row)
    print_rows(console, "Answers with and without guessed tokens; medians of the rounds", rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases named so")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--no-save", action="store_true", help="keep no results")
    args = parser.parse_args(argv)
    console = make_console()
    load = require_idle(console, args.force)
    cases = make_cases(args.repeats, args.only)
    if not cases:
        console.print(f"no case is named like {args.only!r}", markup=False)
        return 2
    with started() as servers, Progress(console=console) as bar:
        meter = CpuMeter(*(server.process.pid for server in servers.values()))
        task = bar.add_task("Measuring", total=len(cases) * (args.repeats + 1))
        for number in range(args.repeats + 1):
            for case in cases:
                if not run_round(servers, case, number):
                    console.print(f"nothing measured: {case.name}: other tokens where guessed")
                    return EXIT_WRONG
                bar.advance(task)
        foreign = meter.foreign_share()
    show(console, cases)
    if not args.no_save:
        common = describe() | {"forced": args.force, "load_before": round(load, 3)}
        scenario = {"repeats": args.repeats, "warm_up": WARM_UP}
        rows = [
            common
            | {
                "bench": "speculation",
                "scenario": scenario | {"name": case.name},
                "values": case.values() | {"foreign_cpu_share": round(foreign, 3)},
            }
            for case in cases
        ]
        console.print(f"results added to {append_rows(rows)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
