"""Published configs of mixtures of experts; ``published_models.py`` has the others."""

from __future__ import annotations

import torch
from builders.bases.published_models import Published

QWEN_3 = {
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
}
ALTERNATING = ["sliding_attention", "full_attention"]
GPT_OSS = {
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "experts_per_token": 4,
    "attention_bias": True,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "initial_context_length": 4096,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            *("model.layers.*.self_attn", "model.layers.*.mlp.router"),
            *("model.embed_tokens", "lm_head"),
        ],
    },
}
MIXTURES = (
    Published(
        "Qwen/Qwen3-30B-A3B",
        "qwen3_moe",
        (2048, 6144, 48, 32, 4, 151936),
        30_532_122_624,
        {**QWEN_3, "moe_intermediate_size": 768},
    ),
    Published(
        "mistralai/Mixtral-8x7B-v0.1",
        "mixtral",
        (4096, 14336, 32, 32, 8, 32000),
        46_702_792_704,
        MIXTRAL,
    ),
    # This model exists in one size.
    Published(
        "allenai/OLMoE-1B-7B-0924",
        "olmoe",
        (2048, 1024, 16, 16, 16, 50304),
        6_919_161_856,
        {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
    ),
    Published(
        "openai/gpt-oss-20b",
        "gpt_oss",
        (2880, 2880, 24, 64, 8, 201088),
        20_914_757_184,
        {**GPT_OSS, "num_local_experts": 32, "layer_types": 12 * ALTERNATING},
    ),
)
# The place of experts below a layer in checkpoints, and the names of gate, up and down.
EXPERTS = {
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "olmoe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
}


def as_in_a_checkpoint(state: dict[str, torch.Tensor], model_type: str) -> dict[str, torch.Tensor]:
    """Undo transformers' stacking of a layer's experts."""
    if model_type == "gpt_oss":
        return dict(pair for item in state.items() for pair in _in_mxfp4(*item))
    if model_type not in EXPERTS:
        return state
    folder, gate, up, down = EXPERTS[model_type]
    found = {}
    for name, tensor in state.items():
        layer, _, leaf = name.partition(".mlp.experts.")
        if leaf == "gate_up_proj":
            for expert, both in enumerate(tensor):
                parts = zip((gate, up), both.chunk(2), strict=True)
                found |= {f"{layer}.{folder}.experts.{expert}.{n}.weight": w for n, w in parts}
        elif leaf:
            found |= {
                f"{layer}.{folder}.experts.{expert}.{down}.weight": weight
                for expert, weight in enumerate(tensor)
            }
        else:
            found[name.replace(".mlp.gate.", f".{folder}.gate.")] = tensor
    return found


def _in_mxfp4(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The experts' weights in the released form: transposed, as codes and exponents."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return [(name, tensor)]
    count, inner, out = tensor.shape
    codes = tensor.new_empty(count, out, inner // 32, 16, dtype=torch.uint8)
    return [(f"{name}_blocks", codes), (f"{name}_scales", codes[..., 0])]
