"""Scores the example fusion and its components on both tasks, through a real server.

Starts ``turret serve``, loads the adapters, and sends the held-out examples of both tasks with each
adapter, with a mix of half of each and with the fusion, all in the same batches::

    python examples/check_fusion.py

Prints a table. Exits with 1 if the fusion is worse than the better component on a task.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from tasks import TASKS, Example
from write_data import FUSIONS

from turret.clients.aio import AsyncTurretClient
from turret.clients.requests import AdapterWeight
from turret.server.server_process import ServerProcess

HERE = Path(__file__).resolve().parent
((NAME, COMPONENTS),) = FUSIONS.items()
MAX_TOKENS = 64
# With this number, a single answer changes the score by half a percentage point.
EXAMPLES = 192
# Column → the adapters of its requests.
SUBJECTS = {
    **{name: (AdapterWeight(name),) for name in COMPONENTS},
    "even mix": tuple(AdapterWeight(name, 0.5) for name in COMPONENTS),
    "fusion": (AdapterWeight(NAME),),
}


async def answers(
    client: AsyncTurretClient, adapters: tuple[AdapterWeight, ...], examples: list[Example]
) -> list[str]:
    """Greedy answers to all examples, which are sent at once."""

    async def ask(example: Example) -> str:
        reply = await client.chat(
            example.prompt, adapters=adapters, temperature=0.0, max_tokens=MAX_TOKENS, timeout=1800
        )
        return reply.text

    return list(await asyncio.gather(*(ask(example) for example in examples)))


async def score_all(address: str) -> dict[tuple[str, str], float]:
    """(task, subject) → mean score."""
    examples = {name: TASKS[name].examples("test", EXAMPLES, 0) for name in COMPONENTS}
    pairs = [(task, subject) for task in COMPONENTS for subject in SUBJECTS]
    async with AsyncTurretClient(address) as client:
        texts = await asyncio.gather(
            *(answers(client, SUBJECTS[subject], examples[task]) for task, subject in pairs)
        )
    scores = {}
    for (task, subject), given in zip(pairs, texts, strict=True):
        points = [TASKS[task].score(e, t) for e, t in zip(examples[task], given, strict=True)]
        scores[task, subject] = sum(points) / len(points)
        for example, text, point in zip(examples[task], given, points, strict=True):
            if subject == "fusion" and point < 1:
                print(f"missed: {example.prompt!r} -> {text!r}")
    return scores


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    flags = ["--adapter-root", str(HERE), "--max-num-seqs", "32", "--max-queued-requests", "4096"]
    for name in COMPONENTS:
        flags += ["--preload", f"{name}=adapters/{name}"]
    flags += ["--preload", f"{NAME}=fusions/{NAME}"]
    with ServerProcess(flags) as server:
        server.wait()
        scores = asyncio.run(score_all(server.address))
    print(f"| task | {' | '.join(SUBJECTS)} |\n|---|{'---|' * len(SUBJECTS)}")
    is_good = True
    for task in COMPONENTS:
        row = [scores[task, subject] for subject in SUBJECTS]
        print(f"| {task}: {TASKS[task].metric} | {' | '.join(f'{s:.1%}' for s in row)} |")
        is_good &= scores[task, "fusion"] >= max(scores[task, name] for name in COMPONENTS)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
