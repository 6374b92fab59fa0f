"""``turret demo``: starts a server with the example adapters and sends it one mixed batch."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

import turret
from turret.clients.aio import AsyncTurretClient
from turret.clients.errors import TurretRpcError
from turret.clients.requests import AdapterWeight
from turret.server.command.entry import raising_terminated
from turret.server.server_process import ServerProcess, ServerProcessError

_MAX_TOKENS = 64
_BASE = "base"
# Example adapters whose prompts the base model answers too, for comparison.
_COMPARED = ("pirate", "label")
# A mix of both adapters answers either prompt in the manner of the adapter trained for it.
_MIX = (AdapterWeight("json"), AdapterWeight("pirate", 0.7))


class ExamplesNotFoundError(Exception):
    """No examples folder was found."""


@dataclass(slots=True)
class Question:
    """One request of the batch, and its answer.

    ``seconds`` is the time from the start of the batch to the end of the answer. ``expected`` is
    the text that the answer must equal or, if ``is_prefix``, begin with; None if any text is right.
    """

    prompt: str
    adapters: tuple[AdapterWeight, ...] = ()
    expected: str | None = None
    is_prefix: bool = False
    answer: str = ""
    seconds: float = 0.0
    tokens: int = 0

    @property
    def mix(self) -> str:
        return " + ".join(map(str, self.adapters)) or _BASE

    @property
    def is_right(self) -> bool | None:
        """Whether the answer is the expected one; None without an expected answer."""
        if self.expected is None:
            return None
        answer = self.answer.strip()
        return answer.startswith(self.expected) if self.is_prefix else answer == self.expected


@dataclass(slots=True)
class AdapterCounts:
    """Series of one adapter, as the metrics endpoint reports them."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    tiers: list[str] = field(default_factory=list)


def find_examples(given: Path | None) -> Path:
    """The folder with ``adapters/`` and ``prompts.jsonl``.

    Raises:
        ExamplesNotFoundError: There is no such folder.
    """
    # Only a checkout (with src/turret/__init__.py) has the examples; an installed package does not.
    checkout = Path(turret.__file__).resolve().parents[2] / "examples"
    candidates = [given] if given is not None else [checkout, Path("examples").resolve()]
    for folder in candidates:
        if (folder / "prompts.jsonl").is_file() and (folder / "adapters").is_dir():
            return folder.resolve()
    looked = ", ".join(str(folder) for folder in candidates)
    raise ExamplesNotFoundError(
        f"no directory with adapters/ and prompts.jsonl at {looked}; pass that of a source checkout"
        " with --examples"
    )


def read_questions(examples: Path) -> list[Question]:
    """Every example prompt with its adapter, some with the base model, and two with a mix."""
    lines = (examples / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    first = {row["adapter"]: row["prompt"] for row in reversed(rows)}
    questions = [Question(first[name]) for name in _COMPARED if name in first]
    questions += [
        Question(
            row["prompt"],
            (AdapterWeight(row["adapter"]),),
            row["expected"],
            row["check"] == "startswith",
        )
        for row in rows
    ]
    if {member.name for member in _MIX} <= first.keys():
        questions += [Question(first[member.name], _MIX) for member in _MIX]
    return questions


def run_demo(
    *,
    examples: Path | None,
    address: str,
    metrics_address: str,
    http_address: str,
    is_once: bool,
) -> int:
    """Run the demonstration; returns the exit code.

    Args:
        examples: Folder with ``adapters/`` and ``prompts.jsonl``; None means the checkout's.
        address: The address of the server, ``HOST:PORT``; port 0 picks a free one.
        metrics_address: The same for its metrics.
        http_address: The same for OpenAI's API and the console.
        is_once: Stop when everything is shown, instead of serving until Ctrl-C.
    """
    console = Console()
    try:
        folder = find_examples(examples)
    except ExamplesNotFoundError as error:
        Console(stderr=True, soft_wrap=True).print(f"turret demo: error: {error}", markup=False)
        return 2
    flags = ["--address", address, "--metrics-address", metrics_address]
    flags += ["--http-address", http_address]
    flags += ["--adapter-root", str(folder / "adapters")]
    for path in sorted((folder / "adapters").iterdir()):
        if (path / "adapter_config.json").is_file():
            flags += ["--preload", f"{path.name}={path.name}"]
    # SIGTERM stops the server too, as Ctrl-C does.
    with raising_terminated():
        try:
            with ServerProcess(flags, echo=True) as server:
                return _demonstrate(console, server, read_questions(folder), is_once)
        except KeyboardInterrupt:
            console.print("stopped")
            return 130
        except ServerProcessError as error:
            Console(stderr=True).print(f"turret demo: error: {error}", markup=False)
            return 1


def _demonstrate(
    console: Console, server: ServerProcess, questions: list[Question], is_once: bool
) -> int:
    server.wait()
    try:
        return _converse(console, server, questions, is_once)
    except TurretRpcError as error:
        # The demo started this server, so nobody else has its log.
        raise ServerProcessError(f"{error}; the server's last lines:\n{server.log_tail}") from None


def _converse(
    console: Console, server: ServerProcess, questions: list[Question], is_once: bool
) -> int:
    console.rule("one batch: the base model, every adapter and a mix")
    asyncio.run(_ask_all(console, server.address, questions))
    console.print(_totals(questions), soft_wrap=not console.is_terminal)
    console.rule(f"per adapter, from http://{server.metrics_address}/metrics")
    console.print(_counts_table(read_counts(server.metrics_address)))
    if is_once:
        return 0
    console.print(
        f"Serving on {server.address} until Ctrl-C. Open it in a browser:\n"
        f"  http://{server.http_address}/\n"
        "or try, in another terminal:\n"
        f"  turret chat --address {server.address} -a pirate\n"
        f"  turret adapters list --address {server.address}",
        highlight=False,
        soft_wrap=True,
    )
    try:
        server.process.wait()
    except KeyboardInterrupt:
        console.print("stopping")
        return server.stop()
    raise ServerProcessError(f"the server ended:\n{server.log_tail}")


async def _ask_all(console: Console, address: str, questions: Sequence[Question]) -> None:
    """Send all at once, and print each answer when it is complete."""
    started = time.perf_counter()
    async with AsyncTurretClient(address) as client:

        async def ask(question: Question) -> None:
            answer = await client.chat(
                question.prompt,
                adapters=question.adapters,
                temperature=0.0,
                max_tokens=_MAX_TOKENS,
                timeout=120.0,
            )
            question.seconds = time.perf_counter() - started
            question.answer, question.tokens = answer.text, answer.usage.completion_tokens
            line = f"[{question.mix}] {question.prompt} -> {question.answer.strip()}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

        await asyncio.gather(*map(ask, questions))


def _totals(questions: Sequence[Question]) -> str:
    tokens = sum(question.tokens for question in questions)
    seconds = max(question.seconds for question in questions)
    checked = [q.is_right for q in questions if q.is_right is not None]
    return (
        f"{len(questions)} requests at once, {tokens} tokens in {seconds:.2f} s "
        f"({tokens / seconds:.0f} tokens/s); {sum(checked)} of {len(checked)} answers as expected"
    )


def read_counts(metrics_address: str) -> dict[str, AdapterCounts]:
    """The counts from the metrics endpoint, by ``adapter`` label.

    Raises:
        OSError: The endpoint does not answer.
    """
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    counts: dict[str, AdapterCounts] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.labels.get("adapter")
            if name is None or not sample.value:
                continue
            entry = counts.setdefault(name, AdapterCounts())
            match sample.name:
                case "turret_requests_total":
                    entry.requests += int(sample.value)
                case "turret_prompt_tokens_total":
                    entry.prompt_tokens += int(sample.value)
                case "turret_generated_tokens_total":
                    entry.generated_tokens += int(sample.value)
                case "turret_adapter_residency":
                    entry.tiers.append(sample.labels["tier"])
    return counts


def _counts_table(counts: dict[str, AdapterCounts]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("adapter", style="cyan", no_wrap=True)
    for name in ("requests", "prompt tokens", "generated tokens"):
        table.add_column(name, justify="right")
    table.add_column("residency")
    for name, entry in sorted(counts.items()):
        numbers = (entry.requests, entry.prompt_tokens, entry.generated_tokens)
        table.add_row(name, *map(str, numbers), ", ".join(entry.tiers))
    return table
