"""``turret convert``: turns adapters with incomplete files into complete ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from turret.server.adapters.base import BaseModel, BaseModule, BaseVocabulary
from turret.server.adapters.checkpoint import (
    PEFT_PREFIX,
    AdapterCheckpoint,
    Findings,
)
from turret.server.adapters.fuser import lora_of
from turret.server.adapters.operators.low_rank import LoraModule
from turret.server.adapters.operators.vocabulary import EMBEDDING, HEAD
from turret.server.adapters.peft_format.refusals import base_name_warning
from turret.server.basics.work import OnProgress
from turret.server.errors import InvalidRequestError
from turret.server.models.families import read_arch, transformers_config
from turret.server.models.model_source import StoredTensors
from turret.server.models.sources.model_directory import (
    fetch_hub_model,
    hub_model_id,
    scale_block,
    weight_files,
)
from turret.training.adapter_folder import new_folder, read_adapter, write_adapter
from turret.training.conversion.kinds import CONVERTED, XLORA, ConvertibleKind, check_plain_base
from turret.training.conversion.xlora import split_xlora
from turret.training.words import say
from turret.words import counted


def convert(
    adapter: Path,
    model: Path | None,
    output: Path,
    *,
    loras: Sequence[Path] = (),
    dtype: torch.dtype | None,
    device: str,
    progress: OnProgress,
) -> tuple[str, list[str]]:
    """Write a LoRA that is equivalent to the adapter, or the parts of an X-LoRA.

    Call ``check_conversion`` first; it needs no torch.

    Args:
        adapter: A directory in the form that PEFT writes.
        model: The base on which it was trained: a directory, or ``org/name`` of the hub. None for
            an X-LoRA, which needs no base.
        output: A new or an empty directory.
        loras: The LoRAs of an X-LoRA, if they are not where its config says.
        dtype: The dtype of the base's weights in training; None means that of its files.
        device: The device for decompositions, preferably the one used in training.
        progress: Called with the progress.

    Returns:
        A sentence about the result, and remarks.

    Raises:
        AdapterCheckpointError: The adapter is unsupported or inconsistent.
        AdapterMismatchError: The adapter does not fit the base.
        InvalidRequestError: The base cannot be read.
        RunError: The base was not used in training, or a part of an X-LoRA is missing or wrong.
    """
    checkpoint = read_adapter(adapter, str(adapter))
    kind = str(checkpoint.config["peft_type"])
    if kind == XLORA:
        with new_folder(output) as build:
            names = split_xlora(checkpoint, adapter, build, loras)
        *components, router = (f"{output}/{name}" for name in names)
        return f"load {router} after {', '.join(components)}", []
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
    return done, [note for note in notes if note]


def _convert_all(
    checkpoint: AdapterCheckpoint, kind: ConvertibleKind, base: BaseModel, progress: OnProgress
) -> tuple[dict[str, LoraModule], dict[str, torch.Tensor]]:
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
    made: Mapping[str, LoraModule],
    saved: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    base: BaseModel,
) -> None:
    named = str(config.get("base_model_name_or_path") or base.name)
    lora, tensors = lora_of(made, base, named)
    tensors |= {f"{PEFT_PREFIX}{name}": tensor.float() for name, tensor in saved.items()}
    for key in ("task_type", "modules_to_save"):
        if config.get(key) is not None:
            lora[key] = config[key]
    write_adapter(folder, lora, tensors, torch.float32)


_WEIGHT, _BIAS = ".weight", ".bias"


def read_plain_base(
    model: Path, dtype: torch.dtype | None, device: str, progress: OnProgress
) -> BaseModel:
    """The description of the base for adapters; each weight is read from its file on demand.

    Args:
        model: A Hugging Face model directory, or ``org/name[@revision]`` of the hub.
        dtype: The dtype of the weights in training; None means that of the files.
        device: The device for the weights.
        progress: Called with the progress of a download from the hub.

    Raises:
        InvalidRequestError: ``model`` is not a model, is quantised, or has an unsupported
            architecture.
    """
    hub_id = hub_model_id(model)
    name = str(model) if hub_id is None else hub_id.repository
    if hub_id is not None:
        model, _ = fetch_hub_model(hub_id, progress)
    said = check_plain_base(model)
    config = transformers_config(model)
    arch = read_arch(config)
    tensors = StoredTensors(weight_files(model), arch.experts, scale_block(said))
    return _base(name, config, tensors, partial(_weight, tensors, dtype, device))


_Read = Callable[[str], torch.Tensor]


def _weight(
    tensors: StoredTensors, dtype: torch.dtype | None, device: str, name: str
) -> torch.Tensor:
    tensor = tensors.get(name)
    if not tensor.is_floating_point():
        text = say("TENSOR_QUANTIZED", name=name, dtype=str(tensor.dtype).removeprefix("torch."))
        raise InvalidRequestError.of("--base", text)
    return tensor.to(dtype or tensor.dtype).to(device, torch.float32)


def _base(name: str, config: Any, tensors: StoredTensors, read: _Read) -> BaseModel:
    is_tied = f"{HEAD}{_WEIGHT}" not in tensors
    modules, others = {}, set[str]()
    for tensor in tensors:
        path = tensor.removesuffix(_WEIGHT)
        if path == tensor or path in (EMBEDDING, HEAD) or ".experts." in path:
            continue
        shape = tensors.shape(tensor)
        if len(shape) == 2:
            modules[path] = _module(path, tensor, shape, tensors, read)
        else:
            others.add(path)
    head = f"{EMBEDDING if is_tied else HEAD}{_WEIGHT}"
    modules[HEAD] = _module(HEAD, head, tensors.shape(head), tensors, read)
    none = torch.empty(0)
    return BaseModel(
        name=name,
        model_type=config.model_type,
        digest="",
        dtype=torch.float32,
        modules=modules,
        other_modules=frozenset(others | {EMBEDDING}),
        # A conversion reads neither the embedding nor the head.
        vocabulary=BaseVocabulary(none, none, is_tied),
        num_layers=0,
        hidden_size=0,
        num_kv_heads=0,
        head_dim=0,
    )


def _module(
    path: str, weight: str, shape: tuple[int, ...], tensors: StoredTensors, read: _Read
) -> BaseModule:
    bias = f"{path}{_BIAS}"
    return BaseModule(
        name=path,
        in_features=shape[1],
        out_features=shape[0],
        bias=read(bias) if bias in tensors else None,
        dequantize=partial(read, weight),
    )
