"""Adapters with random weights for the benchmarked model, made and saved by PEFT."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from turret.server.models.decoding import Arch
from turret.training.base_model import TrainingBase, load_model, without_peft_warnings

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL: tuple[str, ...] = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
# The last token of this kind in a prompt invokes the aLoRA: `<|im_start|>` of ChatML, which opens
# the answer.
_INVOCATION = 1
# With this spread, an update of rank 16 is about a fifth of the base result: enough to change the
# tokens, and too little to make the model overflow.
_SPREAD = 0.05
_TENSORS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def lora(rank: int, targets: Sequence[str] = ALL, **keys: Any) -> peft.LoraConfig:
    """A LoRA of scale 1."""
    keys |= {"r": rank, "lora_alpha": rank, "target_modules": list(targets)}
    return peft.LoraConfig(task_type="CAUSAL_LM", **keys)


def mixed_methods(rank: int, arch: Arch) -> list[peft.PeftConfig]:
    """Configs of several methods, with this rank or number of soft tokens."""
    targets = list(ALL)
    prompt: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": rank}
    # PEFT would derive these sizes from the hidden size, which is wrong for some models.
    keys_and_values: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "num_attention_heads": arch.num_kv_heads,
        "token_dim": arch.num_kv_heads * arch.head_dim,
    }
    return [
        lora(rank),
        lora(rank, use_rslora=True),
        lora(rank, use_dora=True),
        peft.LoHaConfig(r=rank, alpha=rank, target_modules=targets),
        peft.LoKrConfig(r=rank, alpha=rank, target_modules=targets),
        peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"]),
        peft.AdaLoraConfig(init_r=rank, lora_alpha=rank, target_modules=targets, total_step=1000),
        peft.VeraConfig(r=rank, target_modules=targets),
        peft.PrefixTuningConfig(**prompt, **keys_and_values),
        peft.PromptTuningConfig(**prompt),
        peft.PromptEncoderConfig(**prompt),
    ]


def default_methods(circle: int) -> list[peft.PeftConfig]:
    """Configs with PEFT's default sizes, except that C3A's blocks have size ``circle``.

    C3A's own default, 256, need not divide the sizes of the model's modules.
    """
    targets = list(ALL)
    return [
        peft.OFTConfig(target_modules=targets),
        peft.ShiraConfig(target_modules=targets),
        peft.HRAConfig(target_modules=targets),
        peft.MissConfig(target_modules=targets),
        peft.C3AConfig(target_modules=targets, block_size=circle),
        peft.RoadConfig(target_modules=targets),
        lora(8, alora_invocation_tokens=[_INVOCATION]),
    ]


def numbered(kind: str, count: int) -> list[str]:
    """The names of adapters of a kind, such as ``lora-00`` and ``lora-01``."""
    return [f"{kind}-{number:02}" for number in range(count)]


class Writer:
    """Writes adapters for one model.

    To write the first one, it loads the model in 16 bits with the weights as served.

    Args:
        root: The folder that gets a folder for each adapter.
        base: The model.
    """

    def __init__(self, root: Path, base: TrainingBase) -> None:
        self.root = root
        self._base, self._arch = base, base.arch
        modules = [size for group in base.arch.linears().values() for _, *size in group]
        sides = [side for size in modules for side in size]
        self._circle = max(n for n in range(1, 257) if all(side % n == 0 for side in sides))

    @functools.cached_property
    def _model(self) -> Any:
        return load_model(self._base, "nf4-dense", torch.bfloat16, "cpu")

    def write(self, name: str, config: peft.PeftConfig, seed: int) -> str:
        """Write an adapter whose trained weights are near PEFT's initial ones; returns its name."""
        torch.manual_seed(seed)
        with without_peft_warnings():
            adapted = peft.get_peft_model(self._model, config, autocast_adapter_dtype=False)
            with torch.no_grad():
                for path, parameter in adapted.named_parameters():
                    if parameter.requires_grad:
                        # AdaLoRA's values are factors of an update that starts at zero.
                        spread = 1.0 if "lora_E" in path else _SPREAD
                        parameter.add_(torch.randn_like(parameter), alpha=spread)
            # Keep PEFT from looking for the base model's vocabulary.
            adapted.save_pretrained(str(self.root / name), save_embedding_layers=False)
            if not config.is_prompt_learning:
                self._model = adapted.unload()
        return name

    def loras(self, count: int, rank: int) -> list[str]:
        """Write LoRAs; returns their names."""
        names = numbered("lora", count)
        return [self.write(name, lora(rank), number) for number, name in enumerate(names)]

    def in_turn(self, kind: str, count: int, configs: Sequence[peft.PeftConfig]) -> list[str]:
        """Write ``count`` adapters of the methods in turn; returns their names."""
        return [
            self.write(name, configs[number % len(configs)], 1000 + number)
            for number, name in enumerate(numbered(kind, count))
        ]

    def mixed(self, count: int, rank: int) -> list[str]:
        return self.in_turn("mixed", count, mixed_methods(rank, self._arch))

    def defaults(self, count: int) -> list[str]:
        return self.in_turn("default", count, default_methods(self._circle))

    def many_loras(
        self, count: int, ranks: Sequence[int], targets: Sequence[str], num_files: int
    ) -> list[str]:
        """Write adapters with the ranks in turn, each with a unique config and thus digest.

        Tensor files are hard links to a few files. An adapter is still read, hashed and lowered in
        full, but from the page cache once its file has been read.
        """
        files = [
            self.write(f"file-{number:02}", lora(ranks[number % len(ranks)], targets), number)
            for number in range(min(count, num_files))
        ]
        names = []
        for number in range(count):
            original, folder = self.root / files[number % len(files)], self.root / f"many-{number}"
            folder.mkdir()
            os.link(original / _TENSORS, folder / _TENSORS)
            config = json.loads((original / _CONFIG).read_text())
            # A different scale per adapter, so that no two adapters give the same answers.
            config["lora_alpha"] = config["r"] * (1.0 + number / 10_000)
            (folder / _CONFIG).write_text(json.dumps(config))
            names.append(folder.name)
        return names
