"""The architecture of a decoder, read from its Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from turret.server.errors import InvalidRequestError

# Where the modules of a layer are in a checkpoint: ``model.layers.0.self_attn.q_proj``.
LAYER_PREFIX = "model.layers"
SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """What the one decoder needs to know. Sizes are per model, not per shard.

    ``windows`` holds each layer's sliding window in tokens, or None; ``rotary`` whether each layer
    rotates queries and keys (SmolLM3 leaves every fourth layer without).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_model_len: int
    tie_word_embeddings: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rotary: tuple[bool, ...]
    inv_freq: torch.Tensor
    rope_scaling: float

    @property
    def queries_per_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    def linears(self) -> dict[str, tuple[tuple[str, int, int], ...]]:
        """Fused projections of a layer: group → (module path in the layer, out, in) per slice."""
        hidden, head = self.hidden_size, self.head_dim
        q, kv = self.num_heads * head, self.num_kv_heads * head
        inner = self.intermediate_size
        return {
            "qkv": (
                ("self_attn.q_proj", q, hidden),
                ("self_attn.k_proj", kv, hidden),
                ("self_attn.v_proj", kv, hidden),
            ),
            "o": (("self_attn.o_proj", hidden, q),),
            "gate_up": (("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden)),
            "down": (("mlp.down_proj", hidden, inner),),
        }


def read_arch(config: Any) -> Arch:
    """Turn a transformers config into an ``Arch``.

    Args:
        config: A ``PretrainedConfig`` of one of ``SUPPORTED_MODEL_TYPES``.

    Raises:
        InvalidRequestError: The model type, rope type or activation is not supported; names what
            is.
    """
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise InvalidRequestError.of(
            "model",
            f"model_type {config.model_type!r} is not supported; supported: "
            + ", ".join(SUPPORTED_MODEL_TYPES),
        )
    if config.hidden_act != "silu":
        raise InvalidRequestError.of("model", f"hidden_act {config.hidden_act!r} is not supported")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    inv_freq, scaling = _read_rope(config, head_dim)
    layers = config.num_hidden_layers
    return Arch(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_model_len=config.max_position_embeddings,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        qk_norm=config.model_type == "qwen3",
        windows=_read_windows(config, layers),
        rotary=_read_rotary(config, layers),
        inv_freq=inv_freq,
        rope_scaling=scaling,
    )


def _read_rope(config: Any, head_dim: int) -> tuple[torch.Tensor, float]:
    parameters: Mapping[str, Any] = config.rope_parameters or {}
    kind = parameters.get("rope_type", "default")
    if kind not in _SUPPORTED_ROPE_TYPES:
        raise InvalidRequestError.of(
            "model",
            f"rope_type {kind!r} is not supported; supported: {', '.join(_SUPPORTED_ROPE_TYPES)}",
        )
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    # The long tail of scaling formulas is transformers' business.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return inv_freq.float(), float(scaling)


def _read_windows(config: Any, layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,) * layers
    if kinds is None:
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _read_rotary(config: Any, layers: int) -> tuple[bool, ...]:
    flags = getattr(config, "no_rope_layers", None)
    return tuple(bool(flag) for flag in flags) if flags else (True,) * layers
