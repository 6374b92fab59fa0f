"""Whether ``--model`` names what can be served, told without torch and without its weights."""

from __future__ import annotations

from pathlib import Path

from turret.server.models.families import FAMILIES, text_type
from turret.server.models.sources.cache import check_cache_dir
from turret.server.models.sources.embedded import MODEL_NAME, find_gguf
from turret.server.models.sources.gguf_header import SUFFIX, check_gguf, gguf_size, read_sizes
from turret.server.models.sources.hub_model import check_hub_model, hub_model_id
from turret.server.models.sources.model_directory import (
    check_model_directory,
    is_4bit,
    model_name,
    read_config,
)

_GGUF_SIZES = (
    *("embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv"),
)


def check_model(model: Path | None) -> str:
    """Refuse what is no model that can be served.

    Args:
        model: A directory, a GGUF file, or the id of a repository on the hub, which is asked; None
            for the embedded model.

    Returns:
        Its ``model_type``, a key of ``FAMILIES``.

    Raises:
        InvalidRequestError: Says what is there instead, and what to do.
    """
    hub_id = None if model is None else hub_model_id(model)
    if hub_id is not None:
        return check_hub_model(hub_id)
    if model is None or (model.suffix == SUFFIX and model.is_file()):
        kind = check_gguf(find_gguf() if model is None else model)
        check_cache_dir()
        return kind
    config = check_model_directory(model)
    if not is_4bit(config):
        check_cache_dir()
    return text_type(config)


def told_sizes(model: Path | None, model_type: str) -> dict[str, int] | None:
    """What the sizes of a layer's modules come from, as far as it shows without torch.

    Args:
        model: One that :func:`check_model` took.
        model_type: What it returned.

    Returns:
        The arguments of ``dense_linears``. None for mixtures of experts, for models of the hub, and
        where the config leaves a size to transformers.
    """
    family = FAMILIES[model_type]
    if family.has_experts or (model is not None and hub_model_id(model) is not None):
        return None
    if model is None or model.is_file():
        said = read_sizes(find_gguf() if model is None else model)
        keys, head_dim = _GGUF_SIZES, said.get("attention.key_length")
    else:
        config = read_config(model)
        text = config.get("text_config")
        said = text if isinstance(text, dict) and config.get("model_type") != model_type else config
        inner = family.inner_keys.get(model_type, "intermediate_size")
        keys = ("hidden_size", inner, "num_attention_heads", "num_key_value_heads")
        head_dim = said.get("head_dim") or family.head_dims.get(model_type)
    sizes = [value for key in keys if type(value := said.get(key)) is int and value > 0]
    if len(sizes) < len(keys):
        return None
    hidden, inner, heads, kv_heads = sizes
    width = head_dim or hidden // heads
    if type(width) is not int or width < 1:
        return None
    return {"hidden": hidden, "inner": inner, "queries": heads * width, "keys": kv_heads * width}


def name_of_model(model: Path | None) -> str:
    """The name that a model will be served by; ``model`` is one that :func:`check_model` took."""
    if model is None:
        return MODEL_NAME
    hub_id = hub_model_id(model)
    if hub_id is not None:
        return hub_id.repository
    if model.suffix == SUFFIX and model.is_file():
        return model.stem
    return model_name(model, read_config(model))


def size_of_model(model: Path | None) -> tuple[int, int] | None:
    """Width and layers of a model that :func:`check_model` took, where its files here tell."""
    if model is None:
        return gguf_size(find_gguf())
    if hub_model_id(model) is not None:
        return None
    if model.suffix == SUFFIX and model.is_file():
        return gguf_size(model)
    config = read_config(model)
    text = config.get("text_config")
    said = text if isinstance(text, dict) and "hidden_size" in text else config
    width, layers = said.get("hidden_size"), said.get("num_hidden_layers")
    return (width, layers) if isinstance(width, int) and isinstance(layers, int) else None
