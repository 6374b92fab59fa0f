"""Granite 3 and the dense models of Granite 4: four multipliers."""

from __future__ import annotations

from typing import Any

from turret.server.errors import InvalidRequestError
from turret.server.models.decoding.arch import MODULES, Arch
from turret.server.models.family import Family, read_decoder, without_rope
from turret.server.words import say

_MODULES_4 = {
    **MODULES,
    "gate_up": ("shared_mlp.input_linear",),
    "down": ("shared_mlp.output_linear",),
}


def _read(config: Any, **own: Any) -> Arch:
    return read_decoder(
        config,
        attention_scale=config.attention_multiplier,
        embedding_scale=config.embedding_multiplier,
        scales_soft_tokens=True,
        residual_scale=config.residual_multiplier,
        logit_scale=1 / config.logits_scaling,
        **own,
    )


def _read_4(config: Any) -> Arch:
    """Read Granite 4: gate and up are one module, and some models have no rotary positions."""
    layers = config.num_hidden_layers
    if config.num_local_experts or {*config.layer_types} & {"mamba", "linear_attention"}:
        raise InvalidRequestError.of("model", say("GRANITE_HYBRID_UNSUPPORTED"))
    rotates = [config.position_embedding_type == "rope"] * layers
    return _read(
        config,
        intermediate_size=config.shared_intermediate_size,
        rope_of_layer=without_rope(rotates, layers),
    )


FAMILY = Family(
    {"granite": _read, "granitemoehybrid": _read_4},
    modules={"granitemoehybrid": _MODULES_4},
    inner_keys={"granitemoehybrid": "shared_intermediate_size"},
)
