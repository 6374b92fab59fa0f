"""Mixtral: Mistral with experts in every layer, by names of its own in the checkpoint."""

from __future__ import annotations

from typing import Any

from turret.server.models.decoding.arch import Arch, Experts
from turret.server.models.family import Family, read_decoder, read_windows


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


def _read(config: Any) -> Arch:
    return read_decoder(config, windows=read_windows(config), experts=_experts(config))


FAMILY = Family(("mixtral",), _read, experts=_experts)
