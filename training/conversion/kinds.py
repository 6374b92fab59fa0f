"""What is converted, and what can be told to be wrong before torch is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turret.server.adapters.checkpoint.json_files import parse_config
from turret.server.adapters.methods.kit import LinearFormat, Module
from turret.server.adapters.methods.low_rank import xlora
from turret.server.adapters.source import CONFIG_FILE, MAX_CONFIG_BYTES
from turret.server.errors import InvalidRequestError
from turret.server.models.sources.gguf_header import SUFFIX
from turret.server.models.sources.hub_model import hub_model_id
from turret.server.models.sources.model_directory import (
    check_model_directory,
    is_4bit,
    weight_files,
)
from turret.training.conversion import adamss, psoft
from turret.training.conversion.made_lora import MadeLora
from turret.training.errors import RunError


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
        raise RunError(f"{output} is there already; name another --output, or remove it")
    if not adapter.is_dir():
        what = "is a file" if adapter.exists() else "does not exist"
        raise RunError(f"{adapter} {what}; name the directory that PEFT's save_pretrained wrote")
    file = adapter / CONFIG_FILE
    if not file.is_file():
        why = f"there is no {CONFIG_FILE} in {adapter}"
        raise RunError(f"{why}; name the directory that PEFT's save_pretrained wrote")
    kind = parse_config(file.read_bytes()[: MAX_CONFIG_BYTES + 1], str(adapter)).get("peft_type")
    if kind not in KINDS:
        raise not_converted(str(adapter), kind)
    if model is None:
        if kind != XLORA:
            raise RunError(f"{kind} needs --base, the model it was trained on")
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
        why = "a GGUF file is no base that adapters are trained on; name the checkpoint it is of"
        raise InvalidRequestError.of("base", why)
    if not model.exists():
        why = f"{model} does not exist; name the directory of the checkpoint that was trained on"
        raise InvalidRequestError.of("base", f"{why}, or org/name of the Hugging Face hub")
    try:
        said = check_model_directory(model)
        weight_files(model)
    except InvalidRequestError as error:
        raise InvalidRequestError.of("base", error.message.removeprefix("model: ")) from None
    if is_4bit(said):
        why = f"{model} is 4-bit; name the 16-bit or 32-bit checkpoint that was trained on"
        raise InvalidRequestError.of("base", why)
    return said


def not_converted(path: str, kind: object) -> RunError:
    """The refusal of a ``peft_type``."""
    return RunError(
        f"{path}: peft_type {kind!r:.60} is not converted, only {', '.join(KINDS)} are; `turret"
        " serve` takes others as they are, or says what to do with them"
    )
