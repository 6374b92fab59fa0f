"""Mixtral: Mistral with experts in every layer, which have their own names in the checkpoint."""

from __future__ import annotations

from typing import Any

from turret.server.models.decoding.arch import Experts
from turret.server.models.family import Family, read_windowed


def _experts(config: Any) -> Experts:
    return Experts(
        layers=frozenset(range(config.num_hidden_layers)),
        count=config.num_local_experts,
        per_token=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        normalizes=True,
        checkpoint_path="block_sparse_moe",
        modules={"experts_gate_up": ("{}.w1", "{}.w3"), "experts_down": ("{}.w2",)},
    )


FAMILY = Family({"mixtral": read_windowed}, experts=_experts)
