"""The cost of constraints: 16 concurrent requests, without and with constraints.

    python bench/constraints.py [--repeats 9] [--force]

One server runs without speculation, so that all requests compute one token per step. Every round
runs all settings. No answer can end before the last measured token. A counted expression
(``x{2000}``) has a state for every count, so that no mask is reused. Constraints are compiled
before the measurement, as for every request but a client's first.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path

from common.machine import describe, require_idle
from common.report import append_rows, make_console, print_rows
from common.served import Served

from turret.clients.messages.requests import GenerateOptions

_BATCH = 16
_TOKENS = 64
_LENGTH = 2000
FREE = "free"


def make_settings() -> dict[str, list[GenerateOptions]]:
    """The options of each request, by the name of the setting."""
    schemas: list[GenerateOptions] = [
        {
            "json_schema": {
                "type": "object",
                "properties": {
                    f"people_{n}": {
                        "type": "array",
                        "minItems": _LENGTH,
                        "items": {
                            "type": "object",
                            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
                            "required": ["name", "age"],
                        },
                    }
                },
                "required": [f"people_{n}"],
            }
        }
        for n in range(_BATCH)
    ]
    expressions: list[GenerateOptions] = [{"regex": f"[a-zA-Z ,.{n}]+"} for n in range(_BATCH)]
    counted: list[GenerateOptions] = [
        {"regex": f"[a-zA-Z ,.{n}]{{{_LENGTH}}}"} for n in range(_BATCH)
    ]
    free: list[GenerateOptions] = [{} for _ in range(_BATCH)]
    return {
        FREE: free,
        "JSON schema": schemas,
        "regular expression": expressions,
        "counted expression": counted,
    }


def share(rates: list[float], free: list[float]) -> float:
    """The median over the rounds of the rate, relative to the same round without constraints."""
    return statistics.median(a / b for a, b in zip(rates, free, strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="rounds; the median counts")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--no-save", action="store_true", help="do not store the results")
    args = parser.parse_args(argv)
    console = make_console()
    load = require_idle(console, args.force)
    settings = make_settings()
    rates: dict[str, list[float]] = {name: [] for name in settings}
    adapters = [None] * _BATCH
    with tempfile.TemporaryDirectory(prefix="turret-bench-") as folder:
        served = Served(Path(folder), [], flags=("--speculation", "off"))
        with contextlib.ExitStack() as stack:
            stack.callback(served.stop)
            for options in settings.values():
                served.timing(adapters, _TOKENS, options)
            for _ in range(args.repeats):
                for name, options in settings.items():
                    rates[name].append(served.timing(adapters, _TOKENS, options).decode_rate)
    rows = [
        {
            "setting": name,
            "tokens/s": f"{statistics.median(found):.0f}",
            "all": ", ".join(f"{rate:.0f}" for rate in found),
            "of free": f"{share(found, rates[FREE]):.3f}",
        }
        for name, found in rates.items()
    ]
    print_rows(console, f"{_BATCH} requests, decode rate; medians", rows)
    if not args.no_save:
        common = describe() | {"bench": "constraints", "forced": args.force, "load_before": load}
        saved = [
            common
            | {
                "scenario": {"name": name, "batch": _BATCH, "new_tokens": _TOKENS},
                "values": {"tokens_per_second": [round(rate, 1) for rate in found]},
            }
            for name, found in rates.items()
        ]
        console.print(f"results added to {append_rows(saved)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
