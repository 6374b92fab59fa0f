"""Adapters and mixes without files."""

from __future__ import annotations

from typing import Any

from turret.server.adapters.adapter import Adapter, AdapterFacts, Mix, Source
from turret.server.adapters.operators.adapter_operators import AdapterOperators


def facts_of(digest: str = "0", **others: Any) -> AdapterFacts:
    """Facts of an adapter without files."""
    facts: dict[str, Any] = {
        "method": "lora",
        "ranks": (4,),
        "target_modules": ("q_proj",),
        "base_model": "",
        "warnings": (),
        "num_soft_tokens": 0,
        "num_prefix_positions": 0,
        "bytes_disk": 1,
        "bytes_host": 1,
    }
    return AdapterFacts(digest=digest, **{**facts, **others})


def adapter_of(name: str, uuid: str = "", generation: int = 1, **facts: Any) -> Adapter:
    return Adapter(name, uuid or name, generation, Source(name), facts_of(**facts))


class Resident(Adapter):
    """An adapter in host memory."""

    operators: AdapterOperators  # type: ignore[assignment]


def resident(key: str, operators: AdapterOperators) -> Resident:
    soft = operators.soft_prompt
    facts = facts_of(
        num_soft_tokens=0 if soft is None or soft.prefix else soft.num_positions,
        num_prefix_positions=0 if soft is None or not soft.prefix else soft.num_positions,
        invocation=operators.invocation or (),
    )
    adapter = Resident(key, key, 1, Source(key), facts, operators)
    adapter.key = key
    return adapter


def mix_of(*names: str) -> Mix:
    return Mix(tuple((adapter_of(name), 1.0) for name in names if name))
