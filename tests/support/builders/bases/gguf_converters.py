"""The output of llama.cpp's converter for each family's config and tensors.

The rules are those of llama.cpp's ``conversion/`` folder: keys start with the architecture's name,
and the ``gguf`` package maps the checkpoint's tensor names to those of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch

Tensors = Mapping[str, torch.Tensor]
Named = Iterable[tuple[str, torch.Tensor]]
Config = dict[str, Any]
ARCH = gguf.MODEL_ARCH


@dataclass(frozen=True)
class Converter:
    """The conversion of a family.

    Attributes:
        arch: The architecture in the ``gguf`` package.
        own: Returns the keys in addition to the common ones.
        tensors: Returns the tensors under the checkpoint's names, with their rows in the file's
            order.
        factors: Returns the tensors of rotary factors.
        lacks: Common keys that this family lacks.
    """

    arch: gguf.MODEL_ARCH
    own: Callable[[Config], dict[str, Any]] = lambda config: {}
    tensors: Callable[[Tensors, Config], Named] = lambda tensors, config: tensors.items()
    factors: Callable[[Config], dict[str, np.ndarray]] = lambda config: {}
    lacks: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        return gguf.MODEL_ARCH_NAMES[self.arch]

    def keys(self, config: Config) -> dict[str, Any]:
        written = {**_common(config), **self.own(config)}
        return {key: value for key, value in written.items() if key not in self.lacks}

    def converted(self, tensors: Tensors, config: Config) -> Named:
        return self.tensors(tensors, config)


def _common(config: Config) -> dict[str, Any]:
    ropes = config["rope_parameters"]
    rope = ropes.get("full_attention", ropes)
    heads = config["num_attention_heads"]
    written: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(rope["rope_theta"]),
        **_scaling(rope),
    }
    if "sliding_attention" in ropes:
        written["rope.freq_base_swa"] = float(ropes["sliding_attention"]["rope_theta"])
    if config.get("head_dim"):
        written |= {
            "attention.key_length": config["head_dim"],
            "attention.value_length": config["head_dim"],
        }
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        written["expert_count"] = experts
        written["expert_used_count"] = config["num_experts_per_tok"]
    return written


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope["rope_type"]
    if kind == "longrope":
        return {"rope.scaling.type": "longrope"}
    if kind not in ("linear", "yarn"):
        return {}
    written: dict[str, Any] = {
        "rope.scaling.type": kind,
        "rope.scaling.factor": float(rope["factor"]),
    }
    if kind == "yarn":
        written["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for name, key in (
            ("attention_factor", "yarn_attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if rope.get(name) is not None:
                written[f"rope.scaling.{key}"] = float(rope[name])
    return written


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a Llama's q or k in the order of ``LlamaModel.permute``."""
    half = weight.shape[0] // heads // 2
    rows = weight.reshape(heads, 2, half, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def _permuted(tensors: Tensors, config: Config) -> Named:
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            tensor = permute(tensor, config["num_attention_heads"])
        if ".k_proj." in name:
            tensor = permute(tensor, config["num_key_value_heads"])
        yield name, tensor


def _rope_dimensions(config: Config) -> dict[str, Any]:
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {"rope.dimension_count": dim, "vocab_size": config["vocab_size"]}


def _shifted(tensors: Tensors, _: Config) -> Named:
    for name, tensor in tensors.items():
        yield name, tensor.float() + 1 if name.endswith("norm.weight") else tensor


def _caps(config: Config) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": config["attn_logit_softcapping"],
        "final_logit_softcapping": config["final_logit_softcapping"],
        "attention.sliding_window": config["sliding_window"],
    }


def _window(config: Config) -> dict[str, Any]:
    return {"attention.sliding_window": config["sliding_window"]}


def _pattern(config: Config) -> dict[str, Any]:
    if not config.get("sliding_window"):
        return {}
    flags = [kind == "sliding_attention" for kind in config["layer_types"]]
    return {**_window(config), "attention.sliding_window_pattern": flags}


def _phi3_rotated(config: Config) -> int:
    part = config["rope_parameters"].get("partial_rotary_factor", 1.0)
    return int(part * config["hidden_size"]) // config["num_attention_heads"]


def _phi3_lengths(config: Config) -> tuple[int, int]:
    rope = config["rope_parameters"]
    most = config["max_position_embeddings"]
    found = rope.get("original_max_position_embeddings")
    return most, found or config.get("original_max_position_embeddings") or most


def _phi3(config: Config) -> dict[str, Any]:
    most, original = _phi3_lengths(config)
    written = {
        "rope.scaling.original_context_length": original,
        "rope.dimension_count": _phi3_rotated(config),
        "attention.sliding_window": config.get("sliding_window") or 0,
    }
    if "long_factor" in config["rope_parameters"]:
        scale = most / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        written["rope.scaling.attn_factor"] = factor
    return written


def _phi3_factors(config: Config) -> dict[str, np.ndarray]:
    rope = config["rope_parameters"]
    return {
        f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32)
        for kind in ("long", "short")
        if f"{kind}_factor" in rope
    }


def _multipliers(config: Config) -> dict[str, Any]:
    return {
        "attention.scale": float(config["attention_multiplier"]),
        "embedding_scale": float(config["embedding_multiplier"]),
        "residual_scale": float(config["residual_multiplier"]),
        "logit_scale": float(config["logits_scaling"]),
        **_rope_dimensions(config),
    }


def _granite4(config: Config) -> dict[str, Any]:
    """The keys of a model with Mamba layers; llama.cpp uses that converter without them, too."""
    kv_heads = [config["num_key_value_heads"]] * config["num_hidden_layers"]
    return {
        **_multipliers(config),
        "attention.head_count_kv": kv_heads,
        "expert_shared_feed_forward_length": config["shared_intermediate_size"],
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.group_count": config["mamba_n_groups"],
        "ssm.inner_size": config["mamba_expand"] * config["hidden_size"],
        "ssm.time_step_rank": config["mamba_n_heads"],
        "rope.scaling.finetuned": True,
    }


def _granite4_tensors(tensors: Tensors, config: Config) -> Named:
    for name, tensor in _permuted(tensors, config):
        if "input_linear" in name:
            gate, up = tensor.split(config["shared_intermediate_size"])
            layer = name.partition(".shared_mlp")[0]
            yield f"{layer}.mlp.gate_proj.weight", gate
            yield f"{layer}.mlp.up_proj.weight", up
        else:
            yield name.replace("shared_mlp.output_linear", "mlp.down_proj"), tensor


def _ministral3(config: Config) -> dict[str, Any]:
    rope = config["rope_parameters"]
    return {
        **_rope_dimensions(config),
        "rope.scaling.yarn_log_multiplier": float(rope["mscale_all_dim"]),
        "attention.temperature_scale": float(rope["llama_4_scaling_beta"]),
    }


def _glm4(config: Config) -> dict[str, Any]:
    part = config["rope_parameters"]["partial_rotary_factor"]
    return {"rope.dimension_count": int(config["head_dim"] * part)}


_EXPERT = re.compile(r"(model\.layers\.(\d+)\..*experts)\.(\d+)\.(\w+)\.weight")


def _stacked(tensors: Tensors, config: Config) -> Named:
    """A module's experts in one tensor."""
    stacks: dict[tuple[str, str, str], dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = _EXPERT.fullmatch(name)
        if found is None:
            yield name, tensor
            continue
        path, layer, expert, module = found.groups()
        stacks.setdefault((path, layer, module), {})[int(expert)] = tensor
    for (path, layer, module), experts in stacks.items():
        # Mixtral uses the name from the original checkpoint.
        path = f"layers.{layer}.feed_forward.experts" if "block_sparse" in path else path
        values = torch.stack([experts[expert] for expert in sorted(experts)])
        yield f"{path}.{module}.weight", values


def _mixtral(tensors: Tensors, config: Config) -> Named:
    return _permuted(dict(_stacked(tensors, config)), config)


def _gpt_oss(tensors: Tensors, _: Config) -> Named:
    for name, tensor in tensors.items():
        leaf = ".bias" if name.endswith("_bias") else ".weight"
        path = name.removesuffix("_bias")
        if path.endswith("gate_up_proj"):
            values = tensor if leaf == ".bias" else tensor.transpose(1, 2)
            yield path.replace("gate_up_proj", "gate_proj") + leaf, values[:, 0::2]
            yield path.replace("gate_up_proj", "up_proj") + leaf, values[:, 1::2]
        elif path.endswith("experts.down_proj"):
            yield path + leaf, tensor if leaf == ".bias" else tensor.transpose(1, 2)
        elif name.endswith("sinks"):
            yield f"{name}.weight", tensor
        else:
            yield name, tensor


def _gpt_oss_keys(config: Config) -> dict[str, Any]:
    return {**_window(config), "expert_feed_forward_length": config["intermediate_size"]}


def _qwen3_moe(config: Config) -> dict[str, Any]:
    return {"expert_feed_forward_length": config["moe_intermediate_size"]}


_LLAMA = Converter(ARCH.LLAMA, _rope_dimensions, _permuted)
_QWEN2 = Converter(ARCH.QWEN2)
_OLMO = Converter(ARCH.OLMO2, _pattern)
# The converters of the first two Gemma versions write no base frequency.
_GEMMA_LACKS = ("rope.freq_base",)
CONVERTERS: dict[str, Converter] = {
    "gemma": Converter(ARCH.GEMMA, tensors=_shifted, lacks=_GEMMA_LACKS),
    "gemma2": Converter(ARCH.GEMMA2, _caps, _shifted, lacks=_GEMMA_LACKS),
    "gemma3_text": Converter(ARCH.GEMMA3, _window, _shifted, lacks=("rope.freq_base_swa",)),
    "glm4": Converter(ARCH.GLM4, _glm4),
    "gpt_oss": Converter(ARCH.GPT_OSS, _gpt_oss_keys, _gpt_oss),
    "granite": Converter(ARCH.GRANITE, _multipliers, _permuted),
    "granitemoehybrid": Converter(ARCH.GRANITE, _granite4, _granite4_tensors),
    "llama": _LLAMA,
    "mistral": Converter(ARCH.MISTRAL3, _rope_dimensions, _permuted),
    "ministral3": Converter(ARCH.MISTRAL3, _ministral3, _permuted),
    "mixtral": Converter(ARCH.LLAMA, _rope_dimensions, _mixtral),
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "olmoe": Converter(ARCH.OLMOE, tensors=_stacked),
    "phi3": Converter(ARCH.PHI3, _phi3, factors=_phi3_factors),
    "qwen2": _QWEN2,
    "qwen3": Converter(ARCH.QWEN3),
    "qwen3_moe": Converter(ARCH.QWEN3MOE, _qwen3_moe, _stacked),
    "smollm3": Converter(ARCH.SMOLLM3, _rope_dimensions, _permuted),
}


def converter_of(config: Config) -> Converter:
    """The converter of the config's ``model_type``."""
    return CONVERTERS[config["model_type"]]
