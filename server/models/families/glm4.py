"""GLM-4: norms before and after, neighbouring features rotate, gate and up are one module."""

from __future__ import annotations

from typing import Any

from turret.server.models.decoding.arch import MODULES, Arch, LayerNorms
from turret.server.models.family import Family, read_decoder

_NORMS = LayerNorms(
    after_attention="post_self_attn_layernorm",
    after_mlp="post_mlp_layernorm",
)


def _read(config: Any) -> Arch:
    modules = {**MODULES, "gate_up": ("mlp.gate_up_proj",)}
    return read_decoder(config, norms=_NORMS, is_interleaved=True, modules=modules)


FAMILY = Family(("glm4",), _read)
