"""The model families: how the config of each ``model_type`` becomes an ``Arch``.

To add a model, add it to ``FAMILIES``. A model of text and images also needs an entry in
``TEXT_PARTS``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from turret.server.errors import InvalidRequestError, TurretError
from turret.server.models.decoding import (
    MODULES,
    Arch,
    ClampedSwiglu,
    Experts,
    LayerNorms,
    QueryGrowth,
    Rope,
    check_served,
)
from turret.server.words import say

_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
# Name of the kind of layer in models whose layers are all of the same kind.
_ALL_LAYERS = "all"


@dataclass(frozen=True, slots=True)
class Family:
    """The models of one ``model_type`` in ``config.json``.

    Attributes:
        reader: Turns a transformers config into an ``Arch``, which may lack the modules and the
            experts. Raises InvalidRequestError for values of the config that are not supported.
        modules: The modules of a layer; see ``Arch.modules``.
        head_dim: The default width of a head, if it is not the hidden size divided by the number
            of heads.
        inner_key: The config key of the MLP's width.
        experts: For mixtures of experts: reads the experts from a config, or from its JSON, which
            may lack some keys.
    """

    reader: Callable[[Any], Arch]
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MODULES)
    head_dim: int | None = None
    inner_key: str = "intermediate_size"
    experts: Callable[[Any], Experts | None] | None = None

    def read(self, config: Any) -> Arch:
        """Turn a transformers config of the family into an ``Arch``."""
        experts = None if self.experts is None else self.experts(config)
        return replace(self.reader(config), modules=self.modules, experts=experts)


# Readers of the parts of a config that follow Llama's.


def read_decoder(config: Any, **own: Any) -> Arch:
    """The ``Arch`` of a pre-norm decoder with rotary positions and a gated MLP, like Llama.

    Args:
        config: A transformers ``PretrainedConfig``.
        own: Fields of ``Arch`` in which the family differs.

    Raises:
        InvalidRequestError: The rope type is not supported. The error lists the supported ones.
    """
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    fields: dict[str, Any] = {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_model_len": config.max_position_embeddings,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "attention_scale": head_dim**-0.5,
        "windows": (None,) * layers,
        "rope_of_layer": (_ALL_LAYERS,) * layers,
    }
    if "activation" not in own:
        fields["activation"] = config.hidden_act
    if "ropes" not in own:
        parameters = config.rope_parameters or {}
        fields["ropes"] = {_ALL_LAYERS: read_rope(config, parameters, head_dim)}
        if parameters.get("rope_type") == "longrope":
            fields["long_from"] = int(parameters["original_max_position_embeddings"])
    return Arch(**{**fields, **own})


def read_windowed(config: Any, **own: Any) -> Arch:
    """Like ``read_decoder``, for a family whose config may have windows."""
    return read_decoder(config, windows=read_windows(config), **own)


def read_ropes(config: Any) -> dict[str, Any]:
    """``ropes`` and ``rope_of_layer`` of a config with ``rope_parameters`` per ``layer_types``."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    ropes = {
        kind: read_rope(config, config.rope_parameters[kind], head_dim, kind)
        for kind in dict.fromkeys(config.layer_types)
    }
    return {"ropes": ropes, "rope_of_layer": tuple(config.layer_types)}


def read_rope(
    config: Any, parameters: Mapping[str, Any], head_dim: int, kind_of_layer: str | None = None
) -> Rope:
    """The rotary positions of one kind of layer, or of all layers.

    Args:
        config: The whole config, because the scaling formulas read further keys.
        parameters: ``rope_parameters``, or its part for one kind of layer.
        head_dim: Features of a head. ``partial_rotary_factor`` determines how many rotate.
        kind_of_layer: The kind of layer that ``parameters`` belong to.

    Raises:
        InvalidRequestError: The rope type is not supported. The error lists the supported ones.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        said = say(
            "CONFIG_UNSUPPORTED", key="rope_type", value=kind, choices=", ".join(_ROPE_TYPES)
        )
        raise InvalidRequestError.of("model", said)
    # Imported here so that listing the families does not need torch.
    import torch

    if kind == "default":
        rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
        return Rope(1.0 / (parameters["rope_theta"] ** exponents))
    # transformers implements the many scaling formulas.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def frequencies(length: int | None) -> tuple[torch.Tensor, float]:
        where = {} if kind_of_layer is None else {"layer_type": kind_of_layer}
        made = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length, **where)
        return made[0].float(), float(made[1])

    inv_freq, scaling = frequencies(None)
    if kind != "longrope":
        return Rope(inv_freq, scaling)
    # Beyond this length the second list of factors applies.
    longer, _ = frequencies(int(parameters["original_max_position_embeddings"]) + 1)
    return Rope(inv_freq, scaling, longer)


def read_windows(config: Any) -> tuple[int | None, ...]:
    """The width of each layer's sliding window; None for a layer without one."""
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,) * layers
    if kinds is None:
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def without_rope(rotates: list[bool] | None, num_layers: int) -> tuple[str | None, ...]:
    """``Arch.rope_of_layer`` from one flag per layer; without flags, all layers rotate."""
    return tuple(_ALL_LAYERS if flag else None for flag in rotates or [True] * num_layers)


# Experts. The keys of the config differ between families.


def _mixture(config: Any, count: int, **own: Any) -> Experts:
    """Experts in every layer, unless ``own`` lists the layers."""
    fields: dict[str, Any] = {
        "layers": frozenset(range(config.num_hidden_layers)),
        "per_token": config.num_experts_per_tok,
        "normalizes": True,
    }
    return Experts(count=count, **{**fields, **own})


def _mixtral_experts(config: Any) -> Experts:
    return _mixture(
        config,
        config.num_local_experts,
        intermediate_size=config.intermediate_size,
        checkpoint_path="block_sparse_moe",
        modules={"experts_gate_up": ("{}.w1", "{}.w3"), "experts_down": ("{}.w2",)},
    )


def _gpt_oss_experts(config: Any) -> Experts:
    return _mixture(
        config,
        config.num_local_experts,
        intermediate_size=config.intermediate_size,
        router="router",
        # The router's name in bitsandbytes-4bit checkpoints, whose experts are modules.
        checkpoint_routers=("router.linear",),
        modules={"experts_gate_up": ("gate_up_projs.{}",), "experts_down": ("down_projs.{}",)},
        are_stacked=True,
    )


def _olmoe_experts(config: Any) -> Experts:
    return _mixture(
        config,
        config.num_experts,
        intermediate_size=config.intermediate_size,
        normalizes=config.norm_topk_prob,
    )


def _qwen3_experts(config: Any) -> Experts | None:
    """Experts in every ``decoder_sparse_step``-th layer, except for ``mlp_only_layers``."""
    sparse = [
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
    ]
    if not sparse or config.num_experts < 1:
        return None
    return _mixture(
        config,
        config.num_experts,
        layers=frozenset(sparse),
        intermediate_size=config.moe_intermediate_size,
        normalizes=config.norm_topk_prob,
    )


# Configs that differ from Llama's in more than a constant.


def _read_gemma(config: Any, **own: Any) -> Arch:
    """Read Gemma: norms scale by 1 + w, embeddings by √hidden; the gate is a GELU."""
    fields: dict[str, Any] = {
        "activation": "gelu_pytorch_tanh",
        "embedding_scale": config.hidden_size**0.5,
        "norm_offset": 1.0,
    }
    return read_decoder(config, **{**fields, **own})


def _read_gemma2(config: Any, **own: Any) -> Arch:
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
    return _read_gemma(config, **{**fields, **own})


def _read_gemma3(config: Any) -> Arch:
    """Read Gemma 3: normalised query and key heads, frequencies by kind of layer, no score cap."""
    if config.use_bidirectional_attention:
        raise _key_unsupported("use_bidirectional_attention")
    return _read_gemma2(config, qk_norm="head", attention_softcap=None, **read_ropes(config))


def _read_gpt_oss(config: Any) -> Arch:
    """Read gpt-oss (arXiv 2508.10925): biased experts, sinks, windows in every second layer."""
    activation = ClampedSwiglu(float(config.swiglu_alpha), float(config.swiglu_limit))
    return read_windowed(config, activation=activation, has_sinks=True)


def _read_granite(config: Any, **own: Any) -> Arch:
    """Read Granite 3: four multipliers."""
    return read_decoder(
        config,
        attention_scale=config.attention_multiplier,
        embedding_scale=config.embedding_multiplier,
        scales_soft_tokens=True,
        residual_scale=config.residual_multiplier,
        logit_scale=1 / config.logits_scaling,
        **own,
    )


def _read_granite4(config: Any) -> Arch:
    """Read a dense Granite 4: gate and up are one module, and some models do not rotate."""
    layers = config.num_hidden_layers
    if config.num_local_experts or {*config.layer_types} & {"mamba", "linear_attention"}:
        raise InvalidRequestError.of("model", say("GRANITE_HYBRID_UNSUPPORTED"))
    rotates = [config.position_embedding_type == "rope"] * layers
    return _read_granite(
        config,
        intermediate_size=config.shared_intermediate_size,
        rope_of_layer=without_rope(rotates, layers),
    )


def _read_ministral3(config: Any) -> Arch:
    """Read Ministral 3: queries grow with their position, as in Llama 4."""
    rope = config.rope_parameters
    beta = rope.get("llama_4_scaling_beta")
    growth = beta and QueryGrowth(float(beta), int(rope["original_max_position_embeddings"]))
    return read_windowed(config, query_growth=growth or None)


def _read_olmo2(config: Any, **own: Any) -> Arch:
    """Read OLMo 2: norms only after attention and MLP, and over whole queries and keys."""
    norms = LayerNorms(
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
    )
    return read_decoder(config, norms=norms, qk_norm="projection", **own)


def _read_olmo3(config: Any) -> Arch:
    """Read OLMo 3: layers with a sliding window have their own rotary frequencies."""
    return _read_olmo2(config, windows=read_windows(config), **read_ropes(config))


def _read_olmoe(config: Any) -> Arch:
    """Read OLMoE: norms over whole queries and keys."""
    if config.clip_qkv is not None:
        raise _key_unsupported("clip_qkv")
    return read_decoder(config, qk_norm="projection")


def _read_smollm3(config: Any) -> Arch:
    """Read SmolLM3: every fourth layer does not rotate queries and keys."""
    rotates = without_rope(config.no_rope_layers, config.num_hidden_layers)
    return read_windowed(config, rope_of_layer=rotates)


def _key_unsupported(key: str) -> InvalidRequestError:
    return InvalidRequestError.of("model", say("CONFIG_KEY_UNSUPPORTED", key=key))


_GLM4_NORMS = LayerNorms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
_GRANITE4_MODULES = {
    **MODULES,
    "gate_up": ("shared_mlp.input_linear",),
    "down": ("shared_mlp.output_linear",),
}
_GATE_UP = {"gate_up": ("mlp.gate_up_proj",)}
_QKV = {"qkv": ("self_attn.qkv_proj",)}
# Every head of queries and keys is normalised.
_READ_QWEN3 = functools.partial(read_windowed, qk_norm="head")

# ``model_type`` → family.
FAMILIES: Mapping[str, Family] = {
    "gemma": Family(_read_gemma, head_dim=256),
    "gemma2": Family(_read_gemma2, head_dim=256),
    "gemma3_text": Family(_read_gemma3, head_dim=256),
    "glm4": Family(
        functools.partial(read_decoder, norms=_GLM4_NORMS, is_interleaved=True),
        modules={**MODULES, **_GATE_UP},
        head_dim=128,
    ),
    "gpt_oss": Family(_read_gpt_oss, head_dim=64, experts=_gpt_oss_experts),
    "granite": Family(_read_granite),
    "granitemoehybrid": Family(
        _read_granite4, modules=_GRANITE4_MODULES, inner_key="shared_intermediate_size"
    ),
    # SmolLM, SmolLM2 and TinyLlama are saved as Llama.
    "llama": Family(read_decoder),
    # Windows in every layer, in none, or in some.
    "mistral": Family(read_windowed),
    "ministral": Family(read_windowed),
    "ministral3": Family(_read_ministral3, head_dim=128),
    "mixtral": Family(read_windowed, experts=_mixtral_experts),
    "olmo2": Family(_read_olmo2),
    "olmo3": Family(_read_olmo3),
    "olmoe": Family(_read_olmoe, experts=_olmoe_experts),
    # Phi-3, 3.5 and 4: fused modules in the checkpoint, LongRoPE, partial rotary embeddings.
    "phi3": Family(read_windowed, modules={**MODULES, **_QKV, **_GATE_UP}),
    # Qwen2 and Qwen2.5: biases on q, k and v if the checkpoint has them.
    "qwen2": Family(read_windowed),
    # Rotary positions have three axes, for time, height and width (M-RoPE, arXiv 2409.12191,
    # section 2.1), which are equal for text.
    "qwen2_5_vl_text": Family(read_windowed),
    "qwen3": Family(_READ_QWEN3, head_dim=128),
    "qwen3_moe": Family(_READ_QWEN3, experts=_qwen3_experts),
    "smollm3": Family(_read_smollm3),
}
# ``model_type`` of a model of text and images → the default ``model_type`` of its
# ``text_config``.
TEXT_PARTS: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    # Mistral Small 3.1 and later, and Ministral 3.
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2_5_vl_text",
}


def served_types() -> list[str]:
    """The supported values of ``model_type`` in ``config.json``, sorted."""
    return sorted({*FAMILIES, *TEXT_PARTS})


def text_type(config: Mapping[str, Any]) -> Any:
    """The ``model_type`` of a ``config.json`` or of its text part; None if it has none."""
    kind, text = config.get("model_type"), config.get("text_config")
    if isinstance(kind, str) and kind in TEXT_PARTS:
        kind = (text.get("model_type") if isinstance(text, dict) else None) or TEXT_PARTS[kind]
    # A value that is not a string names no type.
    return kind if isinstance(kind, str) else None


def text_config(config: Any) -> Any:
    """A transformers config, or its text part for a model of text and images."""
    if config.model_type not in TEXT_PARTS:
        return config
    text = config.text_config
    # This setting belongs to the whole model's config.
    text.tie_word_embeddings = bool(config.tie_word_embeddings)
    return text


_SHOWN_CHARS = 200


@contextlib.contextmanager
def _checked() -> Iterator[None]:
    """Reports any error of transformers or of a family's reader as an invalid config."""
    try:
        yield
    except (TurretError, MemoryError):
        raise
    except Exception as error:
        problem = " ".join(str(error.args[0] if error.args else error).split())[:_SHOWN_CHARS]
        raise InvalidRequestError.of("model", say("CONFIG_INVALID", problem=problem)) from None


class _HubKernels(ModuleType):
    """Takes the place of transformers' module for kernels from the hub while configs are imported.

    Llama's config imports transformers' activations, which use a decorator of that module. The
    decorator lets a kernel from the hub replace an activation. Importing the real module would also
    import torch's distributed tensors, which takes as long as importing torch. If anything else in
    the module is used, this class imports the real one.
    """

    def use_kernel_forward_from_hub(self, _: str) -> Callable[[type], type]:
        return lambda activation: activation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def _without_hub_kernels() -> Iterator[None]:
    name = "transformers.integrations.hub_kernels"
    mine = _HubKernels(name)
    found = sys.modules.setdefault(name, mine)
    try:
        yield
    finally:
        if found is mine and sys.modules.get(name) is mine:
            del sys.modules[name]


def transformers_config(source: Path | Mapping[str, Any]) -> Any:
    """The transformers config of a model.

    Args:
        source: The model's directory, or the content of its ``config.json``. ``check_numbers`` has
            accepted it.

    Raises:
        InvalidRequestError: transformers rejects it.
    """
    # Imported here because it is slow, and the families are also listed without it.
    from transformers import AutoConfig

    with _checked(), _without_hub_kernels():
        if isinstance(source, Path):
            return AutoConfig.from_pretrained(source)
        return AutoConfig.for_model(**source)


def read_arch(config: Any) -> Arch:
    """Turns a transformers config into an ``Arch``.

    Args:
        config: A ``PretrainedConfig``; for a model of text and images, the text part is read.

    Raises:
        InvalidRequestError: No family supports the ``model_type``, or the model needs something
            that no kernel computes; the error names it.
    """
    with _checked():
        config = text_config(config)
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise not_served(config.model_type)
        arch = family.read(config)
        check_served(arch)
        return arch


def not_served(kind: object) -> InvalidRequestError:
    """The error for an unsupported ``model_type``, which lists the supported ones."""
    served = ", ".join(served_types())
    said = say("CONFIG_UNSUPPORTED", key="model_type", value=kind, choices=served)
    return InvalidRequestError.of("model", said)
