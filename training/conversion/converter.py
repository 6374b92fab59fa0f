"""``turret convert``: turns adapters with incomplete files into complete ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.fuse.lora_files import lora_config
from turret.server.adapters.peft_format.refusals import base_name_warning
from turret.server.log import OnProgress
from turret.training.adapter_folder import new_folder, write_adapter
from turret.training.conversion.kinds import (
    CONVERTED,
    XLORA,
    ConvertibleKind,
    check_conversion,
    not_converted,
)
from turret.training.conversion.made_lora import MadeLora
from turret.training.conversion.plain_base import read_plain_base
from turret.training.conversion.xlora import read_folder, split_xlora
from turret.training.words import say
from turret.words import counted

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        done: A sentence about the result.
        notes: Warnings and remarks.
    """

    done: str
    notes: tuple[str, ...] = ()


def convert(
    adapter: Path,
    model: Path | None,
    output: Path,
    *,
    loras: Sequence[Path] = (),
    dtype: torch.dtype | None,
    device: str,
    progress: OnProgress,
) -> Conversion:
    """Write a LoRA that is equivalent to the adapter, or the parts of an X-LoRA.

    Args:
        adapter: A directory in the form that PEFT writes.
        model: The base on which it was trained: a directory, or ``org/name`` of the hub. None for
            an X-LoRA, which needs no base.
        output: A new or an empty directory.
        loras: The LoRAs of an X-LoRA, if they are not where its config says.
        dtype: The dtype of the base's weights in training; None means that of its files.
        device: The device for decompositions, preferably the one used in training.
        progress: Called with the progress.

    Raises:
        AdapterCheckpointError: The adapter is of another type, unsupported or inconsistent.
        AdapterMismatchError: The adapter does not fit the base.
        InvalidRequestError: The base cannot be read.
        RunError: ``output`` is not empty, the base is missing or was not used in training, or a
            part of an X-LoRA is missing or wrong.
    """
    check_conversion(adapter, model, output)
    checkpoint = read_folder(adapter, str(adapter))
    kind = _kind_of(checkpoint)
    if kind == XLORA:
        with new_folder(output) as build:
            names = split_xlora(checkpoint, adapter, build, loras)
        *components, router = (f"{output}/{name}" for name in names)
        return Conversion(f"load {router} after {', '.join(components)}")
    assert model is not None  # ``check_conversion`` rejects other adapters without a base.
    base = read_plain_base(model, dtype, device, progress)
    base = replace(base, text_prefix=checkpoint.text_prefix)
    made, saved = _convert_all(checkpoint, CONVERTED[kind], base, progress)
    trained_on = str(checkpoint.config.get("base_model_name_or_path") or "")
    warning = base_name_warning(trained_on, base.name)
    notes = [
        CONVERTED[kind].note,
        ""
        if warning is None
        else f"it was trained on base {trained_on!r:.200}, not {base.name!r:.200}",
    ]
    with new_folder(output) as build:
        _write(build, made, saved, checkpoint.config, base)
    rank = max(one.rank for one in made.values())
    done = f"{output}: a LoRA of {counted(len(made), 'module')}, rank {rank} at most"
    return Conversion(done, tuple(note for note in notes if note))


def _kind_of(checkpoint: AdapterCheckpoint) -> str:
    kind = checkpoint.config.get("peft_type")
    if kind not in (*CONVERTED, XLORA):
        raise not_converted(checkpoint.path, kind)
    return str(kind)


def _convert_all(
    checkpoint: AdapterCheckpoint, kind: ConvertibleKind, base: BaseModel, progress: OnProgress
) -> tuple[dict[str, MadeLora], dict[str, torch.Tensor]]:
    """The LoRAs of the modules, and the tensors of modules that are saved as a whole."""
    config = dict(checkpoint.config)
    names = config.pop("modules_to_save", None) or []
    # Leave it to the LoRA's reader to decide whether the task can be served.
    config.pop("task_type", None)
    if not isinstance(names, list):
        findings = Findings(checkpoint.path)
        findings.add("modules_to_save", say("NOT_A_LIST", value=f"{names!r:.60}"))
        findings.raise_if_any()
    saved = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if _is_saved(name.rpartition(".")[0], names)
    }
    own = {name: t for name, t in checkpoint.tensors.items() if name not in saved}
    rest = replace(checkpoint, config=config, tensors=own)
    found = kind.format_of(config).read(rest, base)
    made = {}
    for done, (name, module) in enumerate(found.modules.items()):
        progress("Converting modules", done, len(found.modules))
        made[name] = kind.convert(module)
    progress("Converting modules", len(made), len(made))
    return made, saved


def _is_saved(module: str, names: list[Any]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _write(
    folder: Path,
    made: Mapping[str, MadeLora],
    saved: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    base: BaseModel,
) -> None:
    has_bias = any(one.bias is not None for one in made.values())
    tensors = {f"{_PREFIX}{name}": tensor.float() for name, tensor in saved.items()}
    for name, one in made.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = one.a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = one.b
        if has_bias:
            bias = torch.zeros(len(one.b)) if one.bias is None else one.bias
            tensors[f"{_PREFIX}{name}.lora_B.bias"] = bias
    named = str(config.get("base_model_name_or_path") or base.name)
    ranks = {name: one.rank for name, one in made.items()}
    lora = lora_config(ranks, base, named, has_bias)
    for key in ("task_type", "modules_to_save"):
        if config.get(key) is not None:
            lora[key] = config[key]
    write_adapter(folder, lora, tensors, torch.float32)
