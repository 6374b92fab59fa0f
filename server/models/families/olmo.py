"""OLMo 2 and 3: norms only after attention and MLP, and over whole queries and keys."""

from __future__ import annotations

from typing import Any

from turret.server.models.decoding.arch import Arch, LayerNorms
from turret.server.models.family import Family, read_decoder, read_ropes, read_windows

_NORMS = LayerNorms(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)


def _read_2(config: Any, **own: Any) -> Arch:
    return read_decoder(config, norms=_NORMS, qk_norm="projection", **own)


def _read_3(config: Any) -> Arch:
    """Read OLMo 3: layers with a sliding window have their own rotary frequencies."""
    return _read_2(config, windows=read_windows(config), **read_ropes(config))


FAMILY = Family({"olmo2": _read_2, "olmo3": _read_3})
