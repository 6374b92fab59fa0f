"""Qwen3's mixtures of experts: an MLP in layers that the config lists, experts in the others."""

from __future__ import annotations

import functools
from typing import Any

from turret.server.models.decoding.arch import Experts
from turret.server.models.family import Family, read_windowed


def _experts(config: Any) -> Experts | None:
    sparse = [
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
    ]
    if not sparse or config.num_experts < 1:
        return None
    return Experts(
        layers=frozenset(sparse),
        count=config.num_experts,
        per_token=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        normalizes=config.norm_topk_prob,
    )


_READ = functools.partial(read_windowed, qk_norm="head")
FAMILY = Family({"qwen3_moe": _READ}, experts=_experts)
