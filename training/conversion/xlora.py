"""Splits an X-LoRA as PEFT saves it into a complete classifier and separate LoRAs.

PEFT names the LoRAs ``0``, ``1``, …. Since 0.20, it omits from each file every tensor whose path
contains the name of another LoRA, such as ``layers.1``. The classifier is therefore spread over all
folders: its layer ``n`` is ``layers.weight`` in folder ``n``. The first layers of the LoRAs are not
saved at all; they are taken from the original LoRAs, unless the LoRAs were trained further.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE
from turret.server.adapters.checkpoint import PEFT_PREFIX, AdapterCheckpoint
from turret.server.adapters.component import COMPONENTS_KEY
from turret.training.adapter_folder import read_adapter, write_adapter
from turret.training.words import RunError, say

# Name of the classifier's folder, a sibling of the LoRAs' folders.
ROUTER = "xlora"
_CLASSIFIER = "base_model.internal_xlora_classifier.layers"
_LORA_PREFIX = "base_model.lora_model.model."


def split_xlora(
    checkpoint: AdapterCheckpoint, adapter: Path, build: Path, loras: Sequence[Path]
) -> list[str]:
    """Write the classifier, with the digests of its LoRAs, and the LoRAs.

    Args:
        checkpoint: The checkpoint in ``adapter``.
        adapter: The folder that PEFT wrote.
        build: An empty folder.
        loras: The original LoRAs in order; empty for those that the config names.

    Returns:
        The folders' names in ``build``, those of the LoRAs first.

    Raises:
        AdapterCheckpointError: A LoRA cannot be read.
        RunError: A part is missing, or ``loras`` are not the original ones.
    """
    config = checkpoint.config
    paths = _paths(config)
    if loras and len(loras) != len(paths):
        raise RunError(say("LORA_COUNT", expected=len(paths), found=len(loras)))
    folders = {
        number: read_adapter(adapter / str(number), f"{adapter}/{number}")
        for number in range(len(paths))
        if (adapter / str(number)).is_dir()
    }
    classifier = _classifier(checkpoint, folders)
    for number, path in enumerate(paths):
        given = loras[number] if loras else None
        original = _original(number, folders.get(number), given, path, config)
        _write_lora(build / str(number), folders.get(number), original)
    components = [
        {"name": str(number), "digest": read_adapter(build / str(number), str(number)).digest}
        for number in range(len(paths))
    ]
    places = {str(number): f"../{number}" for number in range(len(paths))}
    (build / ROUTER).mkdir()
    whole = {**config, "adapters": places, COMPONENTS_KEY: components}
    write_adapter(build / ROUTER, whole, classifier, torch.float32)
    return [*places, ROUTER]


def _paths(config: Mapping[str, Any]) -> list[Path]:
    """The directory of each LoRA, in the order of the classifier's outputs.

    The outputs are in numerical order; PEFT's file lists the LoRAs alphabetically, 10 before 2.
    """
    adapters = config.get("adapters")
    if not isinstance(adapters, dict) or not adapters:
        raise RunError(say("XLORA_NO_LORAS"))
    names = [str(number) for number in range(len(adapters))]
    strange = sorted(adapters.keys() - set(names))
    if strange:
        raise RunError(say("XLORA_NAME", value=strange[0]))
    return [Path(str(adapters[name])) for name in names]


def _classifier(
    checkpoint: AdapterCheckpoint, folders: Mapping[int, AdapterCheckpoint]
) -> dict[str, torch.Tensor]:
    """The classifier's tensors by PEFT's names, collected from all folders."""
    depth, dropout = (checkpoint.config.get(key) for key in ("xlora_depth", "xlora_dropout_p"))
    if type(depth) is not int or not 0 < depth <= 64 or not isinstance(dropout, int | float):
        raise RunError(say("XLORA_NUMBERS"))
    whole = {}
    for number in range(0, depth * (step := 3 if dropout > 0 else 2), step):
        for kind in ("weight", "bias"):
            name = f"{_CLASSIFIER}.{number}.{kind}"
            found = [f.tensors[name] for f in (checkpoint, *folders.values()) if name in f.tensors]
            own, bare = folders.get(number), f"{_CLASSIFIER}.{kind}"
            if own is not None and bare in own.tensors:
                found.append(own.tensors[bare])
            if not found:
                raise RunError(say("XLORA_NO_CLASSIFIER", name=name, path=checkpoint.path))
            whole[name] = found[0]
    return whole


def _is_lora(name: str) -> bool:
    return name.startswith(_LORA_PREFIX) and ".lora_" in name.removeprefix(_LORA_PREFIX)


def _original(
    number: int,
    saved: AdapterCheckpoint | None,
    given: Path | None,
    path: Path,
    config: Mapping[str, Any],
) -> Path | None:
    """The folder of an original LoRA; None if the saved LoRA is complete."""
    # Files of PEFT 0.20 and later, which are incomplete, also contain weights of the base.
    names = () if saved is None else saved.tensors
    is_whole = bool(names) and all(_is_lora(n) or n.startswith(_CLASSIFIER) for n in names)
    if is_whole and given is None:
        return None
    if config.get("use_trainable_adapters"):
        if is_whole:
            return None
        raise RunError(say("XLORA_TRAINED_LORAS", number=number))
    original = given or path
    if not (original / CONFIG_FILE).is_file():
        raise RunError(say("XLORA_NO_ORIGINAL", number=number, path=original))
    if saved is not None:
        _check_same(number, saved, original)
    return original


def _check_same(number: int, saved: AdapterCheckpoint, original: Path) -> None:
    """Check that the saved tensors of a LoRA are those of the original."""
    whole = read_adapter(original, str(original)).tensors
    for name, tensor in saved.tensors.items():
        if _is_lora(name):
            other = whole.get(name.removeprefix(_LORA_PREFIX))
            if other is None or not torch.equal(other.float(), tensor.float()):
                raise RunError(say("XLORA_OTHER_LORA", path=original, number=number, name=name))


def _write_lora(folder: Path, saved: AdapterCheckpoint | None, original: Path | None) -> None:
    folder.mkdir()
    if original is not None:
        for name in (CONFIG_FILE, TENSORS_FILE):
            # Copy byte for byte, so that the digest equals that of the same LoRA on a server.
            shutil.copyfile(original / name, folder / name)
        return
    assert saved is not None, "the saved LoRA is complete"
    tensors = {
        f"{PEFT_PREFIX}{name.removeprefix(_LORA_PREFIX)}": tensor
        for name, tensor in saved.tensors.items()
        if _is_lora(name)
    }
    write_adapter(folder, saved.config, tensors, torch.float32)
