"""A model family, and how to read the parts of its config that follow Llama's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from turret.server.errors import InvalidRequestError
from turret.server.models.decoding.arch import MODULES, Arch, Experts, Rope
from turret.server.words import say

_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
# Name of the kind of layer in models whose layers are all of the same kind.
_ALL_LAYERS = "all"


@dataclass(frozen=True, slots=True)
class Family:
    """A model family.

    Attributes:
        readers: Functions by ``model_type`` in ``config.json``. Each turns a transformers config
            into an ``Arch``, which may lack the modules and the experts, and raises
            InvalidRequestError if the family's file does not support something in the config.
        text_part_of: ``model_type`` of models of text and images whose ``text_config`` belongs to
            the family → the ``model_type`` of that part, if it does not have one.
        modules: The modules of a layer by ``model_type``, if they are not ``MODULES``; see
            ``Arch.modules``.
        head_dims: The default width of a head by ``model_type``, if it is not the hidden size
            divided by the number of heads.
        inner_keys: The config key of the MLP's width by ``model_type``, if it is not
            ``intermediate_size``.
        experts: For mixtures of experts: reads the experts from a config, or from its JSON, which
            may lack some keys.
    """

    readers: Mapping[str, Callable[[Any], Arch]]
    text_part_of: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    head_dims: Mapping[str, int] = field(default_factory=dict)
    inner_keys: Mapping[str, str] = field(default_factory=dict)
    experts: Callable[[Any], Experts | None] | None = None

    def read(self, config: Any) -> Arch:
        """Turn a transformers config of the family into an ``Arch``."""
        arch = self.readers[config.model_type](config)
        modules = self.modules.get(config.model_type, MODULES)
        experts = None if self.experts is None else self.experts(config)
        return replace(arch, modules=modules, experts=experts)


def read_decoder(config: Any, **own: Any) -> Arch:
    """A pre-norm decoder with rotary positions and a gated MLP, which most families are.

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
    """The fields of ``Arch`` where each of ``layer_types`` has its own ``rope_parameters``."""
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
    """Rotary positions.

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
    """Each layer's ``sliding_window``, or that of the layers that ``layer_types`` names."""
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,) * layers
    if kinds is None:
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def without_rope(rotates: list[bool] | None, num_layers: int) -> tuple[str | None, ...]:
    """``Arch.rope_of_layer`` from one flag per layer. None instead of flags: all layers rotate."""
    return tuple(_ALL_LAYERS if flag else None for flag in rotates or [True] * num_layers)
