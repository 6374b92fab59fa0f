"""gpt-oss (arXiv 2508.10925): biased experts, attention sinks, a window in every second layer."""

from __future__ import annotations

from typing import Any

from turret.server.models.decoding.arch import Arch, ClampedSwiglu, Experts
from turret.server.models.family import Family, read_windowed


def _experts(config: Any) -> Experts:
    return Experts(
        layers=frozenset(range(config.num_hidden_layers)),
        count=config.num_local_experts,
        per_token=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        normalizes=True,
        router="router",
        # Name in bitsandbytes-4bit checkpoints, whose experts are modules.
        checkpoint_routers=("router.linear",),
        modules={"experts_gate_up": ("gate_up_projs.{}",), "experts_down": ("down_projs.{}",)},
        are_stacked=True,
    )


def _read(config: Any) -> Arch:
    return read_windowed(
        config,
        activation=ClampedSwiglu(float(config.swiglu_alpha), float(config.swiglu_limit)),
        has_sinks=True,
    )


FAMILY = Family({"gpt_oss": _read}, head_dims={"gpt_oss": 64}, experts=_experts)
