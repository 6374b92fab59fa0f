"""What a model family is, and how its config is read where it says what Llama's says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from turret.server.errors import InvalidRequestError
from turret.server.models.decoding.arch import Arch, Rope

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Kind of all layers where a model has one.
_ALL_LAYERS = "all"


@dataclass(frozen=True, slots=True)
class Family:
    """A model family.

    Attributes:
        model_types: What ``model_type`` in ``config.json`` is for it.
        read: Turns a transformers config of one of them into an ``Arch``. Raises
            InvalidRequestError where the config asks for what the family's file does not read.
    """

    model_types: tuple[str, ...]
    read: Callable[[Any], Arch]


def read_decoder(config: Any, **own: Any) -> Arch:
    """A pre-norm decoder with rotary positions and a gated MLP: what most families are.

    Args:
        config: A transformers ``PretrainedConfig``.
        own: Fields of ``Arch`` in which the family differs.

    Raises:
        InvalidRequestError: The rope type is not served; names those that are.
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
        "activation": config.hidden_act,
        "attention_scale": head_dim**-0.5,
        "windows": (None,) * layers,
        "rope_of_layer": (_ALL_LAYERS,) * layers,
    }
    if "ropes" not in own:
        fields["ropes"] = {_ALL_LAYERS: read_rope(config, config.rope_parameters or {}, head_dim)}
    return Arch(**{**fields, **own})


def read_rope(config: Any, parameters: Mapping[str, Any], head_dim: int) -> Rope:
    """Rotary positions.

    Args:
        config: For the scaling formulas, which read more of it.
        parameters: ``rope_parameters``, or its part for one kind of layer.
        head_dim: Features of a head; all rotate.

    Raises:
        InvalidRequestError: The rope type is not served; names those that are.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise InvalidRequestError.of(
            "model", f"rope_type {kind!r} is not served; served are {', '.join(_ROPE_TYPES)}"
        )
    # Here, so that which families there are is known without it.
    import torch

    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return Rope(1.0 / (parameters["rope_theta"] ** exponents))
    # The long tail of scaling formulas is transformers' business.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return Rope(inv_freq.float(), float(scaling))


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
    """``Arch.rope_of_layer`` from a flag per layer; None for flags stands for all."""
    return tuple(_ALL_LAYERS if flag else None for flag in rotates or [True] * num_layers)
