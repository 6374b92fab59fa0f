"""The full-precision base of an adapter. Each linear module is read when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from turret.server.adapters.base import BaseModel, BaseModule, BaseVocabulary
from turret.server.adapters.operators.vocabulary import EMBEDDING, HEAD
from turret.server.errors import InvalidRequestError
from turret.server.log import OnProgress
from turret.server.models.families import read_arch
from turret.server.models.model_source import StoredTensors
from turret.server.models.sources.model_directory import (
    fetch_hub_model,
    hub_model_id,
    scale_block,
    weight_files,
)
from turret.training.conversion.kinds import check_plain_base
from turret.training.words import say

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
    # Imported here because the import is slow and the command's help does not need it.
    from transformers import AutoConfig

    hub_id = hub_model_id(model)
    name = str(model) if hub_id is None else hub_id.repository
    if hub_id is not None:
        model, _ = fetch_hub_model(hub_id, progress)
    said = check_plain_base(model)
    config = AutoConfig.from_pretrained(model)
    arch = read_arch(config)
    tensors = StoredTensors(weight_files(model), arch.experts, scale_block(said))
    return _base(name, config, tensors, partial(_weight, tensors, dtype, device))


_Read = Callable[[str], torch.Tensor]


def _weight(
    tensors: StoredTensors, dtype: torch.dtype | None, device: str, name: str
) -> torch.Tensor:
    tensor = tensors.get(name)
    if not tensor.is_floating_point():
        text = say("TENSOR_QUANTIZED", name=name, dtype=tensor.dtype)
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
