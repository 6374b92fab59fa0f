"""OLMoE: experts in every layer, norms over whole queries and keys."""

from __future__ import annotations

from typing import Any

from turret.server.errors import InvalidRequestError
from turret.server.models.decoding.arch import Arch, Experts
from turret.server.models.family import Family, read_decoder
from turret.server.words import say


def _experts(config: Any) -> Experts:
    return Experts(
        layers=frozenset(range(config.num_hidden_layers)),
        count=config.num_experts,
        per_token=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        normalizes=config.norm_topk_prob,
    )


def _read(config: Any) -> Arch:
    if config.clip_qkv is not None:
        raise InvalidRequestError.of("model", say("CONFIG_KEY_UNSUPPORTED", key="clip_qkv"))
    return read_decoder(config, qk_norm="projection")


FAMILY = Family({"olmoe": _read}, experts=_experts)
