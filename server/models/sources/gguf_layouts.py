"""Names and values that llama.cpp's converters write for each supported architecture.

``general.architecture`` of a file determines its layout. A layout maps the file to one of
transformers' models: the keys of the file to the fields of the config, and the tensors of a layer
to their names in Hugging Face's checkpoints. It also has the values that llama.cpp assumes if a key
is missing. The facts come from ``conversion/`` and ``src/models/`` in llama.cpp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# GGUF key → config field, for every architecture.
WANTED = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LLAMA = {**_NORMS, **_ATTENTION, **_MLP}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tensors of a GGUF file that are one tensor in a checkpoint.

    Attributes:
        first: The name of the first tensor in a layer, such as ``ffn_gate``.
        second: The name of the second tensor, which has the same shape.
        name: The name of the fused tensor, below the layer.
        alternates: Whether their rows alternate. If not, the rows of the second follow those of the
            first.
    """

    first: str
    second: str
    name: str
    alternates: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufLayout:
    """The layout of one architecture.

    Attributes:
        model_type: The model type of transformers' config.
        key: The layout applies to files in which this key is not zero; None for all other files.
        tokenizer: ``auto`` for transformers' class for the model; ``fast`` for its general class,
            if the former does not support GGUF files of this architecture.
        fields: Config field by key; a file without one of the keys is rejected.
        optional: Config field by key, for keys that a file may lack.
        constants: Values of the config for which there is no key.
        ignored: Keys that add no information.
        parts: The name in a checkpoint, below the layer, of each tensor of a layer. ``{}`` stands
            for the expert if a tensor holds all of them.
        pairs: The fused tensors that are two tensors in the file.
        bare: Those of ``parts`` whose name in a checkpoint has no ``.weight``.
        is_permuted: Whether the rows of queries and keys are in the order of interleaved rotation.
        norm_offset: The number that the converter added to the weights of norms.
        rotates_part: Whether ``rope.dimension_count`` may be less than a head.
        theta: The default of ``rope_theta``.
        ropes_by_kind: Whether layers with a window have their own rotary frequencies.
        swa_theta: The default ``rope_theta`` of layers with a window; None for that of the others.
        rope_fields: Like ``fields``, but for ``rope_parameters``.
        rope_constants: Like ``constants``, but for ``rope_parameters`` if they are scaled.
        window: Whether all layers have a window, or some of them, according to ``layer_types``; or
            ``never``, if ``layer_types`` must state that none has one.
        full_every: If ``window`` is ``some`` and the file has no key for the pattern: one in this
            many layers has no window.
        wide_layers: The number of layers of the model that scales scores by hidden / heads instead
            of a head's width (``query_pre_attn_scalar``); None if there is no such field.
    """

    # The file, and the model of transformers that it maps to.
    model_type: str
    key: str | None = None
    tokenizer: Literal["auto", "fast"] = "auto"

    # The keys of the file, and the config.
    fields: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    # The tensors.
    parts: Mapping[str, str]
    pairs: tuple[Pair, ...] = ()
    bare: frozenset[str] = frozenset()
    is_permuted: bool = False
    norm_offset: float = 0.0

    # Rotary positions.
    rotates_part: bool = False
    theta: float = 10000.0
    ropes_by_kind: bool = False
    swa_theta: float | None = None
    rope_fields: Mapping[str, str] = field(default_factory=dict)
    rope_constants: Mapping[str, Any] = field(default_factory=dict)

    # Windows, and the scale of the scores.
    window: Literal["none", "never", "all", "some"] = "none"
    full_every: int | None = None
    wide_layers: int | None = None


# Layers with norms both before and after attention and MLP.
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
_MULTIPLIERS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
# Keys that the converter writes for Mamba layers, even for a dense Granite 4 without any.
_MAMBA = frozenset(
    f"ssm.{name}"
    for name in ("conv_kernel", "state_size", "group_count", "inner_size", "time_step_rank")
)
_OLMO = {
    **_ATTENTION,
    **_HEAD_NORMS,
    **_MLP,
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_LLAMA_ROW = GgufLayout(model_type="llama", parts=_LLAMA, is_permuted=True)
_GRANITE_ROW = GgufLayout(
    model_type="granite",
    parts=_LLAMA,
    optional=_MULTIPLIERS,
    is_permuted=True,
    tokenizer="fast",
)
_MISTRAL_ROW = GgufLayout(
    model_type="mistral",
    parts=_LLAMA,
    constants={"sliding_window": None},
    is_permuted=True,
    tokenizer="fast",
)
_OLMO_ROW = GgufLayout(model_type="olmo2", parts=_OLMO, tokenizer="fast")

# ``general.architecture`` → layouts. The first one applies whose ``key`` the file has with a value
# other than zero, or that has no ``key``.
LAYOUTS: Mapping[str, tuple[GgufLayout, ...]] = {
    "gemma": (
        GgufLayout(
            model_type="gemma",
            parts=_LLAMA,
            constants=_GELU,
            norm_offset=1.0,
            tokenizer="fast",
        ),
    ),
    "gemma2": (
        GgufLayout(
            model_type="gemma2",
            parts={**_FOUR_NORMS, **_ATTENTION, **_MLP},
            fields=_GEMMA_CAPS,
            constants=_GELU,
            norm_offset=1.0,
            tokenizer="fast",
            window="some",
            full_every=2,
            wide_layers=46,
        ),
    ),
    "gemma3": (
        GgufLayout(
            model_type="gemma3_text",
            parts={**_FOUR_NORMS, **_ATTENTION, **_HEAD_NORMS, **_MLP},
            optional={"final_logit_softcapping": "final_logit_softcapping"},
            constants=_GELU,
            norm_offset=1.0,
            tokenizer="fast",
            window="some",
            full_every=6,
            ropes_by_kind=True,
            swa_theta=10000.0,
            theta=1000000.0,
            wide_layers=62,
        ),
    ),
    "glm4": (
        GgufLayout(
            model_type="glm4",
            parts={
                **_NORMS,
                **_ATTENTION,
                "post_attention_norm": "post_self_attn_layernorm",
                "post_ffw_norm": "post_mlp_layernorm",
                "ffn_up": "mlp.gate_up_proj",
                "ffn_down": "mlp.down_proj",
            },
            rotates_part=True,
            tokenizer="fast",
        ),
    ),
    "gpt-oss": (
        GgufLayout(
            model_type="gpt_oss",
            parts={
                **_ATTENTION,
                "attn_norm": "input_layernorm",
                "post_attention_norm": "post_attention_layernorm",
                "attn_sinks": "self_attn.sinks",
                "ffn_gate_inp": "mlp.router",
                "ffn_down_exps": "mlp.experts.down_projs.{}",
            },
            pairs=(Pair("ffn_gate_exps", "ffn_up_exps", "mlp.experts.gate_up_projs.{}", True),),
            bare=frozenset({"attn_sinks"}),
            fields={
                "expert_count": "num_local_experts",
                "expert_used_count": "num_experts_per_tok",
                "expert_feed_forward_length": "intermediate_size",
            },
            window="some",
            full_every=2,
            # The value in gpt-oss' released config; GGUF has no key for it.
            rope_constants={"truncate": False},
            tokenizer="fast",
        ),
    ),
    "granite": (
        # Granite 4: its dense models are a special case of those with Mamba layers.
        GgufLayout(
            model_type="granitemoehybrid",
            parts={**_NORMS, **_ATTENTION, "ffn_down": "shared_mlp.output_linear"},
            pairs=(Pair("ffn_gate", "ffn_up", "shared_mlp.input_linear"),),
            key="ssm.conv_kernel",
            fields={"feed_forward_length": "intermediate_size shared_intermediate_size"},
            optional=_MULTIPLIERS,
            constants={"num_local_experts": 0, "position_embedding_type": "rope"},
            ignored=_MAMBA | {"expert_shared_feed_forward_length"},
            is_permuted=True,
            window="never",
            tokenizer="fast",
        ),
        _GRANITE_ROW,
    ),
    "llama": (
        GgufLayout(
            model_type="mixtral",
            parts={
                **_NORMS,
                **_ATTENTION,
                "ffn_gate_inp": "block_sparse_moe.gate",
                "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
                "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
                "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
            },
            key="expert_count",
            fields={
                "expert_count": "num_local_experts",
                "expert_used_count": "num_experts_per_tok",
            },
            is_permuted=True,
        ),
        _LLAMA_ROW,
    ),
    # Mistral Small 3 and Ministral 3, whose queries grow with their position.
    "mistral3": (
        dataclasses.replace(
            _MISTRAL_ROW,
            model_type="ministral3",
            key="attention.temperature_scale",
            rope_fields={"attention.temperature_scale": "llama_4_scaling_beta"},
        ),
        _MISTRAL_ROW,
    ),
    "olmo2": (
        dataclasses.replace(
            _OLMO_ROW,
            model_type="olmo3",
            key="attention.sliding_window",
            window="some",
            full_every=4,
            ropes_by_kind=True,
        ),
        _OLMO_ROW,
    ),
    "olmoe": (
        GgufLayout(
            model_type="olmoe",
            parts={**_NORMS, **_ATTENTION, **_HEAD_NORMS, **_EXPERTS},
            fields={
                "expert_count": "num_experts",
                "expert_used_count": "num_experts_per_tok",
            },
            constants={"norm_topk_prob": False},
            tokenizer="fast",
        ),
    ),
    "phi3": (
        GgufLayout(
            model_type="phi3",
            parts={
                **_NORMS,
                "attn_qkv": "self_attn.qkv_proj",
                "attn_output": "self_attn.o_proj",
                "ffn_up": "mlp.gate_up_proj",
                "ffn_down": "mlp.down_proj",
            },
            fields={"rope.scaling.original_context_length": "original_max_position_embeddings"},
            rotates_part=True,
            window="all",
        ),
    ),
    "qwen2": (GgufLayout(model_type="qwen2", parts=_LLAMA),),
    "qwen3": (GgufLayout(model_type="qwen3", parts={**_LLAMA, **_HEAD_NORMS}),),
    "qwen3moe": (
        GgufLayout(
            model_type="qwen3_moe",
            parts={**_NORMS, **_ATTENTION, **_HEAD_NORMS, **_EXPERTS},
            fields={
                "expert_count": "num_experts",
                "expert_used_count": "num_experts_per_tok",
                "expert_feed_forward_length": "moe_intermediate_size",
            },
            constants={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        ),
    ),
    # Every fourth layer does not rotate: the config derives these layers from the interval.
    "smollm3": (
        GgufLayout(
            model_type="smollm3",
            parts=_LLAMA,
            constants={"no_rope_layer_interval": 4},
            is_permuted=True,
            tokenizer="fast",
        ),
    ),
}


def layout_of(architecture: str, keys: Mapping[str, Any]) -> GgufLayout:
    """Choose the layout for a file.

    Args:
        architecture: One of ``LAYOUTS``.
        keys: The file's keys below the architecture.
    """
    rows = LAYOUTS[architecture]
    return next(row for row in rows if row.key is None or keys.get(row.key))
