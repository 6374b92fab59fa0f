"""The latency that a fleet adds: the same calls to a server and through a fleet, in turn.

    turret serve --address 127.0.0.1:50051 --threads 1 --speculation off
    turret cluster serve --address 127.0.0.1:50052 --replicas 1 --threads 1 --speculation off
    python bench/live_fleet.py 127.0.0.1:50051 127.0.0.1:50052

With ``--register N``, it also loads N adapters of ``examples/adapters`` with four concurrent calls
on each of the two; both need ``--adapter-root examples/adapters``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

from common.machine import cpu_name
from common.requests import register

from turret.clients.client import TurretClient

_PROMPT = "Once upon a time"
_CALLS = 100
_TOKENS = 500
_EXAMPLES = ("sql", "json", "pirate", "language-lora")


def timed(call: Callable[[], object], count: int) -> float:
    """The median time of a call in milliseconds."""
    taken: list[float] = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken)


def token_ms(client: TurretClient) -> float:
    """The milliseconds per token of one stream, after its first token."""
    chunks = client.generate_stream(_PROMPT, max_tokens=_TOKENS, temperature=0, ignore_eos=True)
    next(chunks)
    start = time.perf_counter()
    count = sum(1 for _ in chunks)
    assert count > _TOKENS * 0.9, "more than a token in a chunk"
    return (time.perf_counter() - start) * 1e3 / count


KINDS: dict[str, Callable[[TurretClient], float]] = {
    "ms of Tokenize": lambda client: timed(lambda: client.tokenize(_PROMPT), 2 * _CALLS),
    "ms of Generate, one token": lambda client: timed(
        lambda: client.generate(_PROMPT, max_tokens=1, temperature=0), _CALLS
    ),
    "ms of GenerateStream, one token": lambda client: timed(
        lambda: list(client.generate_stream(_PROMPT, max_tokens=1, temperature=0)), _CALLS
    ),
    "ms per token of one stream": token_ms,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("server", help="the gRPC address of the server")
    parser.add_argument("fleet", help="the gRPC address of the fleet")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--register", type=int, default=0, metavar="N", help="adapters to load")
    args = parser.parse_args(argv)
    print(cpu_name())
    with TurretClient(args.server) as direct, TurretClient(args.fleet) as through:
        for kind, measure in KINDS.items():
            found: list[tuple[float, float]] = []
            for number in range(args.rounds + 1):
                pair = (direct, through) if number % 2 else (through, direct)
                one, other = measure(pair[0]), measure(pair[1])
                # The first round warms both up.
                if number:
                    found.append((one, other) if number % 2 else (other, one))
            alone, ours = (statistics.median(each) for each in zip(*found, strict=True))
            more = statistics.median(b - a for a, b in found)
            print(f"{kind}: direct {alone:.3f}, through {ours:.3f}, more by {more:.3f}", flush=True)
    if args.register:
        names = [f"adapter{number}" for number in range(args.register)]
        paths = [_EXAMPLES[number % len(_EXAMPLES)] for number in range(args.register)]
        alone, ours = (register(address, names, paths) for address in (args.server, args.fleet))
        print(f"registering: server {alone:.1f} s, fleet {ours:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
