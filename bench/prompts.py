"""The rate of prompt processing, compared with the rate of this machine's matrix products.

    python bench/prompts.py [--repeats 3] [--only TEXT] [--lengths 512 2048]

Each request asks for one token, so its time is that of its prompt. The count of operations includes
the linear modules (two operations per weight and token) and the head (once per request), but not
attention. The machine's rate is that of one large bf16 product of torch on all processors, measured
in every round. The second table covers prompts that arrive while other requests decode.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common.adapters import write_random_loras
from common.machine import describe, require_idle
from common.prompts import Chat, PromptSource
from common.report import append_rows, make_console, print_rows
from common.served import Served

from turret.clients.aio import AsyncTurretClient
from turret.server.models.decoding.arch import Arch
from turret.server.models.families import read_arch
from turret.server.models.model_source import resolve_model
from turret.server.models.sources.check import default_cache_dir

_BATCH = 16
_RANK = 16
_KV_BYTES = 1 << 30
# Size of a square product that is large enough for the library's best rate.
_SIZE = 2048
_SHORT_TOKENS = 64
_DECODING = _BATCH - 1
_DECODED_TOKENS = 96
_ARRIVALS = 5
# Number of tokens that all requests have before the first prompt arrives.
_UNTIL_STEADY = 16


@dataclass(slots=True)
class Case:
    """Concurrent prompts of one length, with an adapter or None each, and the rounds' seconds."""

    name: str
    prompt_tokens: int
    adapters: list[str | None]
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens * len(self.adapters)


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


def operations(arch: Arch, case: Case) -> int:
    """The operations of the base's linear modules per token, and of its head per request."""
    weights = sum(rows * columns for group in arch.linears().values() for _, rows, columns in group)
    head = arch.vocab_size * arch.hidden_size
    return 2 * (weights * arch.num_layers * case.tokens + head * len(case.adapters))


def product_rate() -> float:
    """The operations per second of torch's bf16 product on all processors, at best."""
    left = torch.randn(_SIZE, _SIZE).bfloat16()
    right = torch.randn(_SIZE, _SIZE).bfloat16()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * _SIZE**3 / best


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


@contextlib.contextmanager
def serving(root: Path, loras: list[str], tokens: int) -> Iterator[Served]:
    flags = ("--kv-cache-bytes", str(_KV_BYTES))
    served = Served(root, loras, prompt_tokens=tokens, new_tokens=1, flags=flags)
    try:
        yield served
    finally:
        served.stop()


def measure(
    root: Path, loras: list[str], cases: list[Case], repeats: int
) -> tuple[list[float], list[tuple[str, float, list[float]]]]:
    """Run the cases; returns the machine's rates, and the gaps of decoding requests."""
    rates: list[float] = []
    for length in sorted({case.prompt_tokens for case in cases}):
        with serving(root, loras, length) as served:
            of_length = [case for case in cases if case.prompt_tokens == length]
            served.timing([None])
            for _ in range(repeats):
                rates.append(product_rate())
                for case in of_length:
                    case.seconds.append(served.timing(case.adapters).first_seconds)
    gaps = []
    with serving(root, loras, _SHORT_TOKENS) as served:
        source = PromptSource(served.client, _SHORT_TOKENS)
        for name, adapters in (("base", [None] * _BATCH), (f"{_BATCH} adapters", loras)):
            served.timing(adapters)
            decoding, arriving = source.take(_DECODING), source.take(_ARRIVALS)
            address = served.server.address
            step, longest = asyncio.run(gaps_beside_prompts(address, decoding, arriving, adapters))
            gaps.append((name, step, longest))
    return rates, gaps


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], metavar="TOKENS")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="run only cases with TEXT in their names"
    )
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--no-save", action="store_true", help="do not store the results")
    args = parser.parse_args(argv)
    console = make_console()
    load = require_idle(console, args.force)
    from transformers import AutoConfig

    model = resolve_model(None, default_cache_dir())
    arch = read_arch(AutoConfig.from_pretrained(model.files))
    with tempfile.TemporaryDirectory(prefix="turret-bench-") as folder:
        root = Path(folder)
        loras = write_random_loras(root, _BATCH, rank=_RANK, arch=arch, base_model=model.name)
        cases = [case for case in make_cases(loras, args.lengths) if args.only in case.name]
        rates, gaps = measure(root, loras, cases, args.repeats)
    machine = statistics.median(rates)
    base = {
        (case.prompt_tokens, len(case.adapters)): statistics.median(case.seconds)
        for case in cases
        if case.adapters[0] is None
    }
    rows, saved = [], []
    common = describe() | {"bench": "prompts", "forced": args.force, "load_before": load}
    for case in cases:
        seconds = statistics.median(case.seconds)
        rate = operations(arch, case) / seconds
        alone = base.get((case.prompt_tokens, len(case.adapters)))
        rows.append(
            {
                "case": case.name,
                "seconds": f"{seconds:.2f}",
                "all": ", ".join(f"{s:.2f}" for s in case.seconds),
                "tokens/s": f"{case.tokens / seconds:.0f}",
                "of base's time": f"{seconds / alone:.2f}" if alone else "",
                "products, of the machine's": f"{rate / machine:.2f}",
            }
        )
        values = {
            "seconds": [round(s, 4) for s in case.seconds],
            "products_per_second": round(rate),
            "machine_products_per_second": round(machine),
        }
        scenario = {"name": case.name, "model": model.name, "rank": _RANK}
        saved.append(common | {"scenario": scenario, "values": values})
    print_rows(console, "Prompts, until the last request's first token; medians", rows)
    console.print(f"bf16 products of {_SIZE} x {_SIZE}: {machine / 1e9:.0f} GFLOP/s")
    title = f"{_DECODING} requests decode, a prompt of {_SHORT_TOKENS} tokens comes; ms"
    beside = [
        {
            "case": name,
            "a step": f"{1e3 * step:.1f}",
            "the longest gap, for each prompt": ", ".join(f"{1e3 * gap:.1f}" for gap in longest),
            "in steps, median": f"{statistics.median(longest) / step:.2f}",
        }
        for name, step, longest in gaps
    ]
    print_rows(console, title, beside)
    for name, step, longest in gaps:
        scenario = {"name": f"a prompt comes, {name}", "model": model.name, "rank": _RANK}
        values = {"step_seconds": round(step, 5), "gaps_seconds": [round(g, 5) for g in longest]}
        saved.append(common | {"scenario": scenario, "values": values})
    if not args.no_save:
        console.print(f"results added to {append_rows(saved)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
