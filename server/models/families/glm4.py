"""GLM-4: norms also after attention and MLP, interleaved rotary embedding, fused gate and up."""

from __future__ import annotations

import functools

from turret.server.models.decoding.arch import MODULES, LayerNorms
from turret.server.models.family import Family, read_decoder

_NORMS = LayerNorms(
    after_attention="post_self_attn_layernorm",
    after_mlp="post_mlp_layernorm",
)
FAMILY = Family(
    {"glm4": functools.partial(read_decoder, norms=_NORMS, is_interleaved=True)},
    modules={"glm4": {**MODULES, "gate_up": ("mlp.gate_up_proj",)}},
    head_dims={"glm4": 128},
)
