"""Phi-3, 3.5 and 4: fused modules in the checkpoint, LongRoPE, partial rotary embeddings."""

from __future__ import annotations

from turret.server.models.decoding.arch import MODULES
from turret.server.models.family import Family, read_windowed

_MODULES = {**MODULES, "qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)}
FAMILY = Family({"phi3": read_windowed}, modules={"phi3": _MODULES})
