"""The requirements on a lifecycle result: measured values, their limits, and whether they pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Ranks of the adapters → share of its requests/s that S-LoRA (arXiv 2311.03285) kept from 5 to
# 2,000 adapters. With Llama-7B on an A100, it went from 8.05 to 7.61 (its setting S1) and from 7.48
# to 6.73 (S2). Source: its repository, benchmarks/paper/synthetic/slora/*_table.jsonl.
SLORA_SHARES = {(8,): 0.945, (8, 16, 32, 64): 0.899}


@dataclass(frozen=True, slots=True)
class Bar:
    """One requirement. ``value`` None means that it was not measured, so it does not pass.

    Attributes:
        name: The requirement.
        value: The measured value.
        limit: The bound of the value.
        is_least: Whether the bound is a minimum instead of a maximum.
        unit: The unit of both.
    """

    name: str
    value: float | None
    limit: float
    is_least: bool = False
    unit: str = ""

    @property
    def passed(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.limit if self.is_least else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def bars_of(result: Mapping[str, Any]) -> list[Bar]:
    """The requirements on a document of ``lifecycle.py``."""
    rates = {row["registered"]: row["requests_per_second"] for row in result["throughput"]}
    registering, budgets = result["registering"], result["scenario"]
    host, device = (
        max(row[f"{tier}_bytes_max"] for row in result["memory"]) for tier in ("host", "device")
    )
    return [
        *_throughput(rates, slora_share(budgets)),
        Bar(
            "median TTFT of a resident adapter beside cold loads, over that beside warm ones",
            result["interference"]["ratio"],
            1.1,
        ),
        Bar(
            "what a cold r=16 adapter costs its request",
            result["cold"]["penalty_ms"],
            60,
            unit="ms",
        ),
        Bar(
            f"registering {registering['registered']} adapters by LoadAdapter",
            registering["seconds"],
            60,
            unit="s",
        ),
        Bar("host memory per registered adapter", registering["bytes_each"], 2048, unit="bytes"),
        Bar(
            "process memory that adapters add, over their bytes (gaps, copies)",
            _memory_share(result["memory"]),
            1.2,
        ),
        Bar(
            "adapter bytes in host memory, most seen",
            _mib(host),
            _mib(budgets["host_bytes"]),
            unit="MiB",
        ),
        Bar(
            "adapter bytes on the device, most seen",
            _mib(device),
            _mib(budgets["device_bytes"]),
            unit="MiB",
        ),
        Bar(
            "p99 queue time of a rare adapter over the popular one's p50",
            result["fairness"]["ratio"],
            3,
        ),
    ]


def slora_share(scenario: Mapping[str, Any]) -> float | None:
    """S-LoRA's share with adapters of the same ranks; None if its authors did not measure them."""
    return SLORA_SHARES.get(tuple(sorted(scenario["ranks"])))


def _throughput(rates: Mapping[int, float], slora: float | None) -> list[Bar]:
    """The requirements on measured pairs of numbers of adapters, or on the outermost pair."""
    demands = [(10, 1000, 0.9, "")]
    if slora is not None:
        demands += [(5, 2000, slora, f" (S-LoRA, same ranks: {slora})")]
    found = [demand for demand in demands if demand[0] in rates and demand[1] in rates]
    return [
        Bar(
            f"requests/s at {many} adapters over those at {few}{note}",
            round(rates[many] / rates[few], 3),
            limit,
            is_least=True,
        )
        for few, many, limit, note in found or [(min(rates), max(rates), 0.9, "")]
    ]


def _memory_share(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The additional bytes of the process with the most adapters, per additional byte of adapters.

    None if both have about as much, as in a trial run.
    """
    least = min(rows, key=lambda row: row["host_bytes_max"])
    most = max(rows, key=lambda row: row["host_bytes_max"])
    held = most["host_bytes_max"] - least["host_bytes_max"]
    if held < least["host_bytes_max"]:
        return None
    return round((most["rss_bytes_max"] - least["rss_bytes_max"]) / held, 3)


def _mib(count: int) -> float:
    return count / (1 << 20)
