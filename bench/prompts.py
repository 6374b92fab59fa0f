"""The time for processing prompts, and their effect on requests that decode at that time.

    python bench/prompts.py [--repeats 3] [--only TEXT] [--lengths 512 2048]

Each request asks for one token, so its time is that of its prompt. The second table covers prompts
that arrive while other requests decode.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.report import print_rows
from common.requests import BatchTiming, Chat, PromptSource, send_batch
from common.session import Session, make_parser, session

from turret.clients.aio import AsyncTurretClient
from turret.clients.client import TurretClient

_BATCH = 16
_RANK = 16
_KV_BYTES = 1 << 30
_SHORT_TOKENS = 64
_DECODED_TOKENS = 96
_ARRIVALS = 5
# Number of tokens that all requests have before the first prompt arrives.
_UNTIL_STEADY = 16


@dataclass(slots=True)
class Case:
    """Concurrent prompts of one length, each with an adapter or None, and the rounds' seconds."""

    name: str
    prompt_tokens: int
    adapters: list[str | None]
    seconds: list[float] = field(default_factory=list)


def make_cases(loras: list[str], lengths: Sequence[int]) -> list[Case]:
    return [
        case
        for length in lengths
        for case in (
            Case(f"{length} tokens, base, 1 request", length, [None]),
            Case(f"{length} tokens, one adapter, 1 request", length, [loras[0]]),
            Case(f"{length} tokens, base, {_BATCH} requests", length, [None] * _BATCH),
            Case(f"{length} tokens, same adapter, {_BATCH} requests", length, [loras[0]] * _BATCH),
            Case(f"{length} tokens, {_BATCH} adapters, {_BATCH} requests", length, list(loras)),
        )
    ]


async def gaps_beside_prompts(
    address: str, decoding: Sequence[Chat], arriving: Sequence[Chat], adapters: Sequence[str | None]
) -> tuple[float, list[float]]:
    """The seconds between the steps of decoding requests, alone and when a prompt arrives.

    Returns:
        The median gap without arriving prompts, and for each arriving prompt the longest gap of any
        other request until its first token.
    """
    times: list[list[float]] = [[] for _ in decoding]
    windows: list[tuple[float, float]] = []
    all_decode = asyncio.Event()

    async def decode(client: AsyncTurretClient, number: int) -> None:
        stream = client.chat_stream(
            decoding[number],
            adapters=adapters[number] or (),
            temperature=0.0,
            max_tokens=_DECODED_TOKENS,
            ignore_eos=True,
            token_ids=True,
        )
        async with stream:
            async for chunk in stream:
                times[number] += [time.perf_counter()] * bool(chunk.token_ids)
                if min(map(len, times)) == _UNTIL_STEADY:
                    all_decode.set()

    async def come(client: AsyncTurretClient) -> None:
        await all_decode.wait()
        for prompt in arriving:
            start = time.perf_counter()
            await client.chat(prompt, adapters=adapters[-1] or (), temperature=0.0, max_tokens=1)
            windows.append((start, time.perf_counter()))
            await asyncio.sleep(0.3)

    async with AsyncTurretClient(address) as client:
        streams = [decode(client, number) for number in range(len(decoding))]
        await asyncio.gather(*streams, come(client))
    alone: list[float] = []
    longest = [0.0] * len(windows)
    for moments in times:
        for before, after in itertools.pairwise(moments):
            met = [i for i, (start, end) in enumerate(windows) if before < end and start < after]
            for i in met:
                longest[i] = max(longest[i], after - before)
            if not met:
                alone.append(after - before)
    return statistics.median(alone), longest


def measure_prompts(run: Session, loras: list[str]) -> None:
    cases = [c for c in make_cases(loras, run.args.lengths) if run.args.only in c.name]
    with (
        run.serving(loras, "--kv-cache-bytes", str(_KV_BYTES)) as server,
        TurretClient(server.address) as client,
    ):
        sources = {length: PromptSource(client, length) for length in run.args.lengths}
        for number in range(run.args.repeats + 1):
            for case in cases:
                prompts = sources[case.prompt_tokens].take(len(case.adapters))
                answers = send_batch(server.address, prompts, case.adapters, 1)
                # The first round warms the server up.
                if number:
                    case.seconds.append(BatchTiming.of(answers).first_seconds)
    base = {
        (case.prompt_tokens, len(case.adapters)): statistics.median(case.seconds)
        for case in cases
        if case.adapters[0] is None
    }
    rows = []
    for case in cases:
        seconds = statistics.median(case.seconds)
        alone = base.get((case.prompt_tokens, len(case.adapters)))
        rows.append(
            {
                "case": case.name,
                "seconds": f"{seconds:.2f}",
                "all": ", ".join(f"{s:.2f}" for s in case.seconds),
                "tokens/s": f"{case.prompt_tokens * len(case.adapters) / seconds:.0f}",
                "relative to base": f"{seconds / alone:.2f}" if alone else "",
            }
        )
    print_rows(run.console, "Prompts, until the last request's first token; medians", rows)
    run.save(
        [
            ({"name": case.name, "rank": _RANK}, {"seconds": [round(s, 4) for s in case.seconds]})
            for case in cases
        ]
    )


def measure_gaps(run: Session, loras: list[str]) -> None:
    rows, saved = [], []
    with run.serving(loras) as server, TurretClient(server.address) as client:
        source = PromptSource(client, _SHORT_TOKENS)
        for name, adapters in (("base", [None] * _BATCH), (f"{_BATCH} adapters", loras)):
            send_batch(server.address, source.take(_BATCH), adapters, 1)
            decoding, arriving = source.take(_BATCH - 1), source.take(_ARRIVALS)
            step, longest = asyncio.run(
                gaps_beside_prompts(server.address, decoding, arriving, adapters)
            )
            shown = ", ".join(f"{1e3 * gap:.1f}" for gap in longest)
            rows.append(
                {
                    "case": name,
                    "a step": f"{1e3 * step:.1f}",
                    "the longest gap, for each prompt": shown,
                    "median, in steps": f"{statistics.median(longest) / step:.2f}",
                }
            )
            values = {"step_seconds": step, "gaps_seconds": longest}
            saved.append(({"name": f"a prompt comes, {name}", "rank": _RANK}, values))
    title = f"{_BATCH - 1} requests decode while prompts of {_SHORT_TOKENS} tokens arrive; ms"
    print_rows(run.console, title, rows)
    run.save(saved)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, 3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], metavar="TOKENS")
    args = parser.parse_args(argv)
    with session("prompts", args) as run:
        loras = run.write.loras(_BATCH, _RANK)
        measure_prompts(run, loras)
        measure_gaps(run, loras)
    return 0


if __name__ == "__main__":
    sys.exit(main())
