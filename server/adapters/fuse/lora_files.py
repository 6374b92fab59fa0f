"""Writes an adapter in PEFT's layout, such as a fusion's result: a config and a safetensors file.

This code writes tensor by tensor, because the format is simple, and a library's single call would
build the whole file in memory and hold the GIL while requests are served.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE
from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.adapter_checkpoint import PEFT_PREFIX
from turret.server.adapters.checkpoint.reader import begin_digest
from turret.server.adapters.fuse.module_fuser import FusedModule
from turret.server.adapters.methods import METHODS
from turret.server.adapters.state_dir import StagedUpload, UploadedFile

# The method that reads these files.
METHOD = "lora"


def fused_files(
    modules: Mapping[str, FusedModule], base: BaseModel, base_model: str
) -> AdapterFiles:
    """The files of a result.

    Args:
        modules: The modules by path, not empty.
        base: The base of the modules.
        base_model: The base's name for the config.
    """
    has_bias = any(module.bias is not None for module in modules.values())
    ranks = {name: module.rank for name, module in modules.items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, module in modules.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = module.a
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = module.b
        if has_bias:
            bias = torch.zeros(len(module.b)) if module.bias is None else module.bias
            tensors[f"{PEFT_PREFIX}{name}.lora_B.bias"] = bias
    return AdapterFiles(lora_config(ranks, base, base_model, has_bias), tensors)


class AdapterFiles:
    """The two files of an adapter.

    Args:
        config: PEFT's keys.
        tensors: fp32 on the CPU, by PEFT's names.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self._config = json.dumps(config, indent=2).encode()
        self._tensors = tensors
        self._header = _header(tensors)

    def announced(self) -> list[UploadedFile]:
        """Names and sizes, in the form in which an upload announces them."""
        size = len(self._header) + sum(tensor.nbytes for tensor in self._tensors.values())
        return [UploadedFile(CONFIG_FILE, len(self._config)), UploadedFile(TENSORS_FILE, size)]

    def write(self, staged: StagedUpload, check: Callable[[], None]) -> None:
        """Writes and syncs both files; ``check`` is called between pieces and may raise.

        Raises:
            StorageFullError: The disk is full.
        """
        staged.write(CONFIG_FILE, self._config)
        staged.write(TENSORS_FILE, self._header)
        for tensor in self._tensors.values():
            check()
            staged.write(TENSORS_FILE, _bytes_of(tensor))
        staged.finish()


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file of fp32 tensors on the CPU.

    Raises:
        OSError: The disk is full or broken; safetensors' own function raises another error.
    """
    with path.open("wb") as file:
        file.write(_header(tensors))
        file.writelines(map(_bytes_of, tensors.values()))


def digest_of(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """The digest of an adapter with this config, whose tensors ``save_tensors`` writes."""
    digest = begin_digest(config)
    digest.update(_header(tensors))
    for tensor in tensors.values():
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def target_modules(names: list[str], base: BaseModel) -> list[str]:
    """The last components if they select exactly these modules, otherwise the whole paths."""
    leaves = {_leaf(name) for name in names}
    selected = [name for name in base.modules if _leaf(name) in leaves]
    return sorted(leaves) if len(selected) == len(names) else names


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def lora_config(
    ranks: Mapping[str, int], base: BaseModel, base_model: str, has_bias: bool
) -> dict[str, Any]:
    """The config of a LoRA with these ranks. Alpha equals the rank, so nothing is scaled.

    Args:
        ranks: The ranks by path of the module, not empty.
        base: The base of the modules.
        base_model: The base's name for the config.
        has_bias: Whether every module has a bias for B.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": next(iter(METHODS["lora"].peft_types)),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": target_modules(list(ranks), base),
        "bias": "none",
        "lora_bias": has_bias,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A safetensors header: its length, then JSON, padded with spaces to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        entries[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
