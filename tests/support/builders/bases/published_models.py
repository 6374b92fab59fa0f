"""Published configs of real sizes, as far as they affect reading a model.

``published_models.json`` has parts of ``config.json`` from each repository on the Hugging Face hub,
and the number of parameters on its page, or null. The numbers in LongRoPE's lists are invented,
because they do not matter here. Mistral's multimodal models omit ``tie_word_embeddings``, but the
default is wrong, because their checkpoints have a head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Published:
    """A repository, the number of parameters on its page, and its config."""

    repository: str
    num_parameters: int | None
    config: dict[str, Any]

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    def write(self, folder: Path) -> Path:
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


_FILE = Path(__file__).with_suffix(".json")
PUBLISHED = tuple(Published(**each) for each in json.loads(_FILE.read_text()))
# The place of experts below a layer in checkpoints, and the names of gate, up and down.
EXPERTS = {
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "olmoe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
}


def as_in_a_checkpoint(state: dict[str, torch.Tensor], model_type: str) -> dict[str, torch.Tensor]:
    """Undo transformers' stacking of a layer's experts."""
    if model_type == "gpt_oss":
        return dict(pair for item in state.items() for pair in _in_mxfp4(*item))
    if model_type not in EXPERTS:
        return state
    folder, gate, up, down = EXPERTS[model_type]
    found = {}
    for name, tensor in state.items():
        layer, _, leaf = name.partition(".mlp.experts.")
        if leaf == "gate_up_proj":
            for expert, both in enumerate(tensor):
                parts = zip((gate, up), both.chunk(2), strict=True)
                found |= {f"{layer}.{folder}.experts.{expert}.{n}.weight": w for n, w in parts}
        elif leaf:
            found |= {
                f"{layer}.{folder}.experts.{expert}.{down}.weight": weight
                for expert, weight in enumerate(tensor)
            }
        else:
            found[name.replace(".mlp.gate.", f".{folder}.gate.")] = tensor
    return found


def _in_mxfp4(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The experts' weights in the released form: transposed, as codes and exponents."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return [(name, tensor)]
    count, inner, out = tensor.shape
    codes = tensor.new_empty(count, out, inner // 32, 16, dtype=torch.uint8)
    return [(f"{name}_blocks", codes), (f"{name}_scales", codes[..., 0])]
