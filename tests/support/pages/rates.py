"""Decode rates from the newest results of ``make bench``."""

from __future__ import annotations

import json

from checkout import ROOT

from turret.server.models.sources.check import MODEL_NAME

RESULTS = ROOT / "bench" / "results" / "amd-epyc.jsonl"
# Scenario of bench/decode.py → its name in the README.
SHOWN = {
    "base, 1 request": "base, 1 request",
    "base, 16 requests": "base, 16 requests",
    "one adapter, 1 request": "one adapter, 1 request",
    "same adapter, 16 requests": "same adapter, 16 requests",
    "16 adapters, 16 requests": "16 different adapters, 16 requests",
    "mixed methods, 16 requests": "16 adapters of 11 methods at rank 8, 16 requests",
}


def newest_rates() -> dict[str, float]:
    """Decode tokens/s of the bundled model by scenario, from the newest row of each."""
    rates: dict[str, float] = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        name = row["scenario"]["name"]
        if row["bench"] == "decode" and name in SHOWN and row["scenario"]["model"] == MODEL_NAME:
            rates[name] = row["values"]["decode_tokens_per_second"]
    assert rates.keys() == SHOWN.keys()
    return rates


def render_rates() -> str:
    lines = ["| | tokens/s |", "|---|---|"]
    lines += [f"| {SHOWN[name]} | {rate:.0f} |" for name, rate in newest_rates().items()]
    return "\n".join(lines)


def render_costs() -> str:
    """The cost of rank-16 LoRAs relative to the base's throughput."""
    rates = newest_rates()

    def lost(name: str, base: str) -> str:
        return f"{100.0 * (1.0 - rates[name] / rates[base]):.0f}%"

    return (
        "- The cost of serving grows with the rank. LoRAs of rank 16 on all modules reduce the"
        " tokens per second\n  of one request by"
        f" {lost('one adapter, 1 request', 'base, 1 request')}, of sixteen requests for one"
        f" adapter by {lost('same adapter, 16 requests', 'base, 16 requests')}, and of sixteen\n"
        "  requests for different adapters by"
        f" {lost('16 adapters, 16 requests', 'base, 16 requests')} (SmolLM2-135M on a CPU,"
        " `make bench`)."
    )
