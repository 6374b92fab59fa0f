"""Phi-3, 3.5 and 4: fused modules in the checkpoint, LongRoPE, partial rotary embeddings."""

from __future__ import annotations

from typing import Any

from turret.server.models.decoding.arch import MODULES, Arch
from turret.server.models.family import Family, read_decoder, read_windows

_MODULES = {**MODULES, "qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)}


def _read(config: Any) -> Arch:
    return read_decoder(config, windows=read_windows(config), modules=_MODULES)


FAMILY = Family(("phi3",), _read, modules={"phi3": _MODULES})
