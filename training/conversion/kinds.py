"""The kinds of adapters that can be converted, with the checks that do not need torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turret.server.adapters.adapter import CONFIG_FILE, MAX_CONFIG_BYTES
from turret.server.adapters.checkpoint.reader import parse_config
from turret.server.adapters.methods import xlora
from turret.server.adapters.methods.kit import LinearFormat, Module
from turret.server.adapters.operators.low_rank import LoraModule
from turret.server.errors import InvalidRequestError
from turret.server.models.sources.gguf_header import SUFFIX
from turret.server.models.sources.model_directory import (
    check_model_directory,
    hub_model_id,
    is_4bit,
    weight_files,
)
from turret.training.conversion import adamss, psoft
from turret.training.words import RunError, say


@dataclass(frozen=True, slots=True)
class ConvertibleKind:
    """A type of adapter that can be converted to a LoRA."""

    format_of: Callable[[Mapping[str, Any]], LinearFormat]
    convert: Callable[[Module], LoraModule]
    note: str = ""


ADAMSS = "ADAMSS"
# X-LoRA is assembled from parts that PEFT saves in several folders; it needs no base.
(XLORA,) = xlora.METHOD.peft_types
CONVERTED: Mapping[str, ConvertibleKind] = {
    ADAMSS: ConvertibleKind(adamss.format_of, adamss.convert),
    "PSOFT": ConvertibleKind(
        lambda config: psoft.FORMAT,
        psoft.convert,
        "the signs of singular vectors depend on the linear algebra library; this is the adapter as"
        " PEFT loads it with the torch installed here, on this device",
    ),
}
# The values of ``peft_type`` that can be converted.
KINDS = (*CONVERTED, XLORA)


def check_conversion(adapter: Path, model: Path | None, output: Path) -> None:
    """Reject adapters and bases that cannot be converted, as far as their configs show that.

    Args:
        adapter: A directory in the form that PEFT writes.
        model: The base on which it was trained: a directory, or ``org/name`` of the hub. The hub is
            not queried.
        output: The directory for the result.

    Raises:
        AdapterCheckpointError: The adapter's config is not a JSON object.
        InvalidRequestError: The base cannot be read.
        RunError: ``output`` is not empty, the directory is not an adapter of a type that can be
            converted, or a base or package is missing.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(say("PATH_EXISTS", path=output))
    if not adapter.is_dir():
        raise RunError(say("FOLDER_MISSING", path=adapter))
    file = adapter / CONFIG_FILE
    if not file.is_file():
        raise RunError(say("NOT_PEFT_FOLDER", path=adapter, file=CONFIG_FILE))
    kind = parse_config(file.read_bytes()[: MAX_CONFIG_BYTES + 1], str(adapter)).get("peft_type")
    if kind not in KINDS:
        raise RunError(say("NOT_CONVERTED", path=adapter, value=kind, choices=", ".join(KINDS)))
    if kind == ADAMSS and not importlib.util.find_spec("sklearn"):
        step = "`pip install scikit-learn` adds it"
        raise RunError(say("NOT_INSTALLED", packages="scikit-learn", step=step))
    if model is None:
        if kind != XLORA:
            raise RunError(say("NEEDS_BASE", method=kind))
    elif hub_model_id(model) is None:
        check_plain_base(model)


def check_plain_base(model: Path) -> Mapping[str, Any]:
    """Reject a directory that is not a model in full precision.

    Returns:
        The content of ``config.json``.

    Raises:
        InvalidRequestError: ``model`` is a GGUF file, a quantised model, or not a model.
    """
    if model.suffix == SUFFIX:
        raise InvalidRequestError.of("--base", say("BASE_IS_GGUF", path=model))
    if not model.exists():
        raise InvalidRequestError.of("--base", say("BASE_NOT_FOUND", path=model))
    try:
        said = check_model_directory(model)
        weight_files(model)
    except InvalidRequestError as error:
        found = [("--base", text) for _, text in error.violations]
        raise InvalidRequestError.of_all(found) from None
    if is_4bit(said):
        raise InvalidRequestError.of("--base", say("BASE_IS_4BIT", path=model))
    return said
