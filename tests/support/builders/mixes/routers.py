"""Arrow routers, created and saved by PEFT, with the names of their components added."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from builders.adapters import read_adapter
from builders.methods import copy_of, quiet
from peft import ArrowConfig, PeftModel, create_arrow_model
from safetensors.torch import save_file
from torch import nn

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE


def arrow_model(
    model: nn.Module, root: Path, experts: Sequence[str], general: Sequence[str] = (), **keys: Any
) -> PeftModel:
    """The reference: PEFT's router for the LoRAs ``root/<name>``, on a copy of ``model``."""
    config = ArrowConfig(**{"top_k": 2, "rng_seed": 3, **keys}, use_gks=bool(general))
    paths = [[str(root / name) for name in names] for names in (experts, general)]
    with quiet(), torch.random.fork_rng():
        made = create_arrow_model(
            copy_of(model, share=True),
            paths[0],
            config,
            paths[1] or None,
            # The factors keep the file's dtype, as for a base in fp32.
            autocast_adapter_dtype=model.dtype != torch.float64,
        )
    return made.eval()


def save_router(
    model: nn.Module,
    root: Path,
    name: str,
    experts: Sequence[str],
    general: Sequence[str] = (),
    **keys: Any,
) -> PeftModel:
    """Write ``root/name``, a router for ``root/<expert>``; returns PEFT's model."""
    made = arrow_model(model, root, experts, general, **keys)
    with quiet():
        made.save_pretrained(str(root / name), selected_adapters=["arrow_router"])
    folder = root / name / "arrow_router"
    for file in folder.iterdir():
        file.rename(root / name / file.name)
    folder.rmdir()
    config_file = root / name / CONFIG_FILE
    config = json.loads(config_file.read_text())
    arrow = config["arrow_config"]
    names = [*arrow["task_adapter_names"], *arrow["gks_adapter_names"]]
    config["components"] = _components(root, names, [*experts, *general])
    config_file.write_text(json.dumps(config))
    return made


def write_router(
    root: Path, name: str, experts: Sequence[str], target_modules: Any, **arrow: Any
) -> Path:
    """Write ``root/name`` directly: a config, and a file without tensors."""
    config = {
        "peft_type": "LORA",
        "target_modules": target_modules,
        "arrow_config": {"top_k": 2, "task_adapter_names": list(experts), **arrow},
        "components": _components(root, experts, experts),
    }
    (root / name).mkdir()
    (root / name / CONFIG_FILE).write_text(json.dumps(config))
    save_file({}, root / name / TENSORS_FILE)
    return root / name


def _components(root: Path, names: Sequence[str], folders: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"name": name, "digest": read_adapter(root, folder).digest}
        for name, folder in zip(names, folders, strict=True)
    ]
