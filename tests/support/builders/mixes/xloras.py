"""X-LoRAs, created and saved by PEFT and completed by ``turret convert``."""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from builders.methods import copy_of, make_config, quiet, save_adapter
from peft import PeftModel, XLoraConfig, get_peft_model
from torch import nn

from turret.server.cli import main

LORAS: dict[str, dict[str, Any]] = {
    "a": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "b": {"target_modules": ["q_proj", "o_proj", "up_proj"], "lora_alpha": 3},
    "c": {"target_modules": "all-linear", "use_rslora": True},
}
# The settings of a config in addition to its LoRAs.
KINDS: dict[str, dict[str, Any]] = {
    "deep": {"xlora_depth": 3, "layerwise_scalings": True, "top_k_lora": 2},
    "shallow": {"xlora_depth": 1, "softmax_temperature": 0.4, "global_scaling_weight": 1.7},
    "plain": {"xlora_depth": 2, "enable_softmax": False, "xlora_dropout_p": 0.0},
    "twice": {
        "xlora_depth": 2,
        "enable_softmax": False,
        "enable_softmax_topk": True,
        "top_k_lora": 2,
        "layerwise_scalings": True,
    },
    # An X-LoRA with a first pass other than the base's.
    "constant": {"xlora_depth": 2, "layerwise_scalings": True, "scaling_pass_value": 0.3},
}


def save_loras(model: nn.Module, root: Path, *, strength: float = 0.5) -> None:
    """Write ``root/a``, ``root/b`` and ``root/c``."""
    for seed, (name, keys) in enumerate(LORAS.items()):
        save_adapter(model, make_config("lora", **keys), root / name, seed=seed, strength=strength)


def xlora_model(
    model: nn.Module, root: Path, *, loras: Sequence[str] = tuple(LORAS), **keys: Any
) -> PeftModel:
    """The reference: PEFT's X-LoRA of ``root/<lora>`` on a copy of ``model``."""
    base: Any = copy_of(model, share=True)
    base.config = copy.deepcopy(base.config)
    base.config.use_cache = False
    paths = {str(number): str(root / name) for number, name in enumerate(loras)}
    values = {"hidden_size": base.config.hidden_size, "xlora_size": 20, **keys}
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        made = get_peft_model(
            base,
            XLoraConfig(task_type="CAUSAL_LM", adapters=paths, **values),
            autocast_adapter_dtype=False,
        )
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "classifier" in name:
                    parameter.normal_(0.0, 0.5)
    assert isinstance(made, PeftModel)
    return made.eval()


def save_xlora(model: nn.Module, root: Path, name: str, **keys: Any) -> PeftModel:
    """Write ``root/name`` and its LoRAs ``root/0`` and so on; returns PEFT's model."""
    made = xlora_model(model, root, **keys)
    with quiet():
        made.save_pretrained(str(root / f"{name}-saved"))
    with contextlib.redirect_stdout(io.StringIO()):
        output = root / f"{name}-whole"
        assert main(["convert", str(root / f"{name}-saved"), "--output", str(output)]) == 0
    for folder in output.iterdir():
        target = root / (name if folder.name == "xlora" else folder.name)
        if not target.exists():
            shutil.copytree(folder, target)
    return made
