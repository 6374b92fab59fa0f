"""GLM-4: norms also after attention and MLP, interleaved rotary embedding, fused gate and up."""

from __future__ import annotations

from typing import Any

from turret.server.models.decoding.arch import MODULES, Arch, LayerNorms
from turret.server.models.family import Family, read_decoder

_NORMS = LayerNorms(
    after_attention="post_self_attn_layernorm",
    after_mlp="post_mlp_layernorm",
)
_MODULES = {**MODULES, "gate_up": ("mlp.gate_up_proj",)}


def _read(config: Any) -> Arch:
    return read_decoder(config, norms=_NORMS, is_interleaved=True, modules=_MODULES)


FAMILY = Family(("glm4",), _read, modules={"glm4": _MODULES}, head_dims={"glm4": 128})
