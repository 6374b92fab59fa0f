"""The architecture of a decoder, as data. Families read it from Hugging Face configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from turret.server.errors import InvalidRequestError

if TYPE_CHECKING:
    import torch

# Where the modules of a layer are in a checkpoint: ``model.layers.0.self_attn.q_proj``.
LAYER_PREFIX = "model.layers"
# Activations of the gate that every path has a kernel for.
ACTIVATIONS = ("silu",)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (RoFormer, arXiv 2104.09864) of one kind of layer.

    Attributes:
        inv_freq: Radians per position, ``[rotated features of a head / 2]`` fp32.
        scaling: Multiplies cosines and sines.
    """

    inv_freq: torch.Tensor
    scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Where a layer has norms, by the name of each one's module in the layer; None for nowhere.

    A norm *after* attention or MLP is applied to its result before that is added to the residual.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    def names(self) -> tuple[str, ...]:
        """Those there are, in the order in which a layer applies them."""
        places = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in places if name is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """What the one decoder needs to know. Sizes are per model, not per shard.

    The decoders read most of this; ``check_served`` refuses the values that no kernel computes yet.

    Attributes:
        model_type: As the config names it. Information: nothing is decided by it.
        head_dim: Width of one head.
        activation: What the MLP's gate goes through, as Hugging Face names it.
        attention_scale: Multiplies the scores.
        embedding_scale: Multiplies what the embedding gives.
        residual_scale: Multiplies what attention and MLP add.
        logit_scale: Multiplies the logits.
        norm_offset: Added to the weights of all norms (1 where a norm is ``1 + w``).
        norms: The norms of a layer.
        qk_norm: Whether queries and keys are normed, head by head or the whole projection at once.
        attention_softcap: ``c · tanh(score / c)`` where it is not None.
        logit_softcap: The same of logits.
        windows: Each layer's sliding window in tokens, or None.
        ropes: Rotary positions by kind of layer.
        rope_of_layer: Each layer's kind, or None for a layer that does not rotate.
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
    activation: str
    attention_scale: float
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    norm_offset: float = 0.0
    norms: LayerNorms = LayerNorms()
    qk_norm: Literal["head", "projection"] | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int | None, ...]
    ropes: Mapping[str, Rope]
    rope_of_layer: tuple[str | None, ...]

    @property
    def queries_per_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    def linears(self) -> dict[str, tuple[tuple[str, int, int], ...]]:
        """Fused projections of a layer: (module path in the layer, out, in) per slice, by name."""
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


# The one value of each of these that the decoders compute.
_ONLY = {
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "norm_offset": 0.0,
    "attention_softcap": None,
    "logit_softcap": None,
}


def check_served(arch: Arch) -> None:
    """Checks that the decoders compute what an architecture says.

    Raises:
        InvalidRequestError: They do not; names everything that is missing.
    """
    missing = [
        f"{name} {getattr(arch, name)}"
        for name, value in _ONLY.items()
        if getattr(arch, name) != value
    ]
    if arch.activation not in ACTIVATIONS:
        missing.append(f"activation {arch.activation!r} (there is {', '.join(ACTIVATIONS)})")
    norms = arch.norms
    if norms.before_attention is None or norms.before_mlp is None:
        missing.append("layers without a norm before attention and MLP")
    if norms.after_attention is not None or norms.after_mlp is not None:
        missing.append("norms after attention or MLP")
    if arch.qk_norm == "projection":
        missing.append("norms over all heads of queries and keys at once")
    if any(2 * len(rope.inv_freq) != arch.head_dim for rope in arch.ropes.values()):
        missing.append("heads that rotate in part")
    if missing:
        raise InvalidRequestError.of(
            "model", f"{arch.model_type} needs what is not served yet: {'; '.join(missing)}"
        )
