"""Gemma, Gemma 2, Gemma 3: norms scale by 1 + w, embeddings by √hidden; the gate is a GELU.

Gemma 3, from 4B up, is released with a vision tower.
"""

from __future__ import annotations

from typing import Any

from turret.server.errors import InvalidRequestError
from turret.server.models.decoding.arch import Arch, LayerNorms
from turret.server.models.family import Family, read_decoder, read_ropes, read_windows
from turret.server.words import say


def _read_1(config: Any, **own: Any) -> Arch:
    fields: dict[str, Any] = {
        "activation": "gelu_pytorch_tanh",
        "embedding_scale": config.hidden_size**0.5,
        "norm_offset": 1.0,
    }
    return read_decoder(config, **{**fields, **own})


def _read_2(config: Any, **own: Any) -> Arch:
    """Read Gemma 2: norms before and after, a scale of the scores from the config, soft caps."""
    fields: dict[str, Any] = {
        "activation": config.hidden_activation,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attention_softcap": config.attn_logit_softcapping,
        "logit_softcap": config.final_logit_softcapping,
        "norms": LayerNorms(
            after_attention="post_attention_layernorm",
            before_mlp="pre_feedforward_layernorm",
            after_mlp="post_feedforward_layernorm",
        ),
        "windows": read_windows(config),
    }
    return _read_1(config, **{**fields, **own})


def _read_3(config: Any) -> Arch:
    """Read Gemma 3: normalised query and key heads, frequencies by kind of layer, no score cap."""
    if config.use_bidirectional_attention:
        said = say("CONFIG_KEY_UNSUPPORTED", key="use_bidirectional_attention")
        raise InvalidRequestError.of("model", said)
    return _read_2(config, qk_norm="head", attention_softcap=None, **read_ropes(config))


_READERS = {"gemma": _read_1, "gemma2": _read_2, "gemma3_text": _read_3}
FAMILY = Family(
    _READERS,
    text_part_of={"gemma3": "gemma3_text"},
    head_dims=dict.fromkeys(_READERS, 256),
)
