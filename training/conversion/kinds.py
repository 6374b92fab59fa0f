"""What is converted, and what can be told to be wrong before torch is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turret.server.adapters.adapter import CONFIG_FILE, MAX_CONFIG_BYTES
from turret.server.adapters.checkpoint.files import parse_config
from turret.server.adapters.methods.kit import LinearFormat, Module
from turret.server.adapters.methods.low_rank import xlora
from turret.server.errors import InvalidRequestError
from turret.server.models.sources.gguf_header import SUFFIX
from turret.server.models.sources.model_directory import (
    check_model_directory,
    hub_model_id,
    is_4bit,
    weight_files,
)
from turret.training.conversion import adamss, psoft
from turret.training.conversion.made_lora import MadeLora
from turret.training.errors import RunError
from turret.training.words import say


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of adapter that becomes a LoRA."""

    format_of: Callable[[Mapping[str, Any]], LinearFormat]
    convert: Callable[[Module], MadeLora]
    note: str = ""


# Made of parts that PEFT scatters over its folders; needs no base.
(XLORA,) = xlora.METHOD.peft_types
CONVERTED: Mapping[str, Kind] = {
    "ADAMSS": Kind(adamss.format_of, adamss.convert),
    "PSOFT": Kind(
        psoft.format_of,
        psoft.convert,
        "which of two opposite singular vectors comes out is up to the linear algebra library: this"
        " is the adapter as PEFT loads it with the torch installed here, on this device",
    ),
}
# Values of ``peft_type``.
KINDS = (*CONVERTED, XLORA)


def check_conversion(adapter: Path, model: Path | None, output: Path) -> None:
    """Refuse what cannot be converted, as far as names and configs tell.

    Args:
        adapter: A directory as PEFT writes it.
        model: The base that it was trained on: a directory, or ``org/name`` of the hub, which is
            not asked.
        output: Where the result goes.

    Raises:
        AdapterCheckpointError: The adapter's config is no JSON object.
        InvalidRequestError: The base is nothing that can be read.
        RunError: ``output`` is taken, the adapter is none, or one that is not converted, or a base
            is missing.
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
        raise not_converted(str(adapter), kind)
    if model is None:
        if kind != XLORA:
            raise RunError(say("NEEDS_BASE", method=kind))
    elif hub_model_id(model) is None:
        check_plain_base(model)


def check_plain_base(model: Path) -> Mapping[str, Any]:
    """Refuse a directory that adapters were not trained on in full precision.

    Returns:
        Its ``config.json``.

    Raises:
        InvalidRequestError: A GGUF file, no model, or a quantised one.
    """
    if model.suffix == SUFFIX:
        raise InvalidRequestError.of("base", say("BASE_IS_GGUF", path=model))
    if not model.exists():
        raise InvalidRequestError.of("base", say("BASE_NOT_FOUND", path=model))
    try:
        said = check_model_directory(model)
        weight_files(model)
    except InvalidRequestError as error:
        found = [("base", text) for _, text in error.violations]
        raise InvalidRequestError.of_all(found) from None
    if is_4bit(said):
        raise InvalidRequestError.of("base", say("BASE_IS_4BIT", path=model))
    return said


def not_converted(path: str, kind: object) -> RunError:
    """The refusal of a ``peft_type``."""
    return RunError(say("NOT_CONVERTED", path=path, value=kind, choices=", ".join(KINDS)))
