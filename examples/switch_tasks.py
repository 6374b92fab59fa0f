"""Sends requests of three tasks to three adapters, and switches adapters within a conversation.

Run it against a server that has the example adapters::

    turret serve --adapter-root examples/adapters \
        --preload json=json --preload sql=sql --preload label=label
    python examples/switch_tasks.py

Every request names the adapter of its task, and nothing else is needed to switch. The cost of a
switch depends on the prefix cache. Cached keys and values belong to the adapter that computed them,
because they are wrong for any other. So the first turn with another adapter computes the whole
conversation once. A later turn with an earlier adapter reuses what that adapter has computed, and
computes only the turns since then. The second half of the output shows this.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

from turret.clients.aio import AsyncTurretClient

PROMPTS = Path(__file__).resolve().parent / "prompts.jsonl"
# The beginning of a message → the adapter of its task. A real router could be a classifier.
ROUTES = {"JSON ": "json", "SQL ": "sql", "Label ": "label"}
CONVERSATION = (
    "JSON with name, age, city, job: Nora Murphy is a 42-year-old architect from Lisbon.",
    "JSON with customer, item, quantity: Please send 12 umbrellas to Marco Bianchi in Oslo.",
    "SQL for cars(model, brand, mileage): How many cars are there for each brand?",
    "JSON with customer, item, quantity: Please send 3 lamps to Zoe Clarke in Naples.",
    "Label as billing, shipping, bug or praise: The umbrellas have not arrived yet.",
    "SQL for movies(title, director, rating): List the title of all movies.",
)
MAX_TOKENS = 48


def route(message: str) -> str:
    """The adapter for a message.

    Raises:
        ValueError: No task's messages begin like this.
    """
    for beginning, adapter in ROUTES.items():
        if message.startswith(beginning):
            return adapter
    raise ValueError(f"no task for {message[:40]!r}")


async def answer_stream(client: AsyncTurretClient, rows: Sequence[dict[str, str]]) -> int:
    """Send all requests of all tasks at once; the server batches them.

    Returns:
        The number of answers that are not the expected ones.
    """
    wrong = 0
    answers = await asyncio.gather(
        *(
            client.chat(
                row["prompt"],
                adapters=route(row["prompt"]),
                temperature=0,
                max_tokens=MAX_TOKENS,
                stop="\n",
            )
            for row in rows
        )
    )
    for row, answer in zip(rows, answers, strict=True):
        good = answer.text.strip() == row["expected"]
        wrong += not good
        (used,) = answer.adapters_used
        print(f"{used.name:5} {'ok' if good else 'NOT EXPECTED'}: {answer.text.strip()}")
    return wrong


async def converse(client: AsyncTurretClient) -> None:
    """Hold one conversation with turns for different tasks."""
    print("turn adapter prompt cached computed")
    messages: list[dict[str, str]] = []
    for number, message in enumerate(CONVERSATION, 1):
        messages.append({"role": "user", "content": message})
        answer = await client.chat(
            messages, adapters=route(message), temperature=0, max_tokens=MAX_TOKENS, stop="\n"
        )
        messages.append({"role": "assistant", "content": answer.text})
        prompt, cached = answer.usage.prompt_tokens, answer.usage.cached_tokens
        print(f"{number:4} {route(message):7} {prompt:6} {cached:6} {prompt - cached:8}")


def interleaved() -> list[dict[str, str]]:
    """The rows of ``prompts.jsonl`` for the three tasks, alternating between the tasks."""
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    by_task = [[row for row in rows if row["adapter"] == name] for name in ROUTES.values()]
    return [row for row in chain.from_iterable(zip_longest(*by_task)) if row is not None]


async def run(address: str) -> int:
    async with AsyncTurretClient(address) as client:
        wrong = await answer_stream(client, interleaved())
        await converse(client)
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Switch adapters by task.")
    parser.add_argument("--address", default="127.0.0.1:50051", help="address of the server")
    return asyncio.run(run(parser.parse_args().address))


if __name__ == "__main__":
    sys.exit(main())
