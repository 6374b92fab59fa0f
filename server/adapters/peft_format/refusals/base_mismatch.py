"""Why an adapter does not fit a base model, as one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from turret.server.adapters.base import BaseModel

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_A = (".lora_A.weight", ".hada_w1_b", ".lora_A")
# Modules of models of text and images beside the language model, which alone is served.
_VISION = ("vision_tower.", "visual.", "multi_modal_projector.", "vision_model.")


def cause_of_mismatch(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], base: BaseModel
) -> str:
    """The likeliest cause, and what the adapter was trained for; "" if nothing stands out.

    Args:
        config: ``adapter_config.json``.
        tensors: By canonical name.
        base: The base model as served.
    """
    causes = (_vision(tensors), too_many_layers(tensors, base.num_layers), _width(tensors, base))
    cause = next((text for text in causes if text), "")
    names = trained_for_another(config, base.name)
    return "; ".join(text for text in (cause, names) if text)


def trained_for_another(config: Mapping[str, Any], base: str) -> str:
    """That the config names another base; "" where it does not."""
    trained = config.get("base_model_name_or_path")
    # One name twice would deny what the cause says.
    is_other = trained and trained != base
    return f"trained for {trained!r:.200}, served is {base!r:.200}" if is_other else ""


def _vision(names: Iterable[str]) -> str:
    for name in names:
        own = name.removeprefix("model.")
        if own.startswith(_VISION):
            return (
                f"it adapts the {own.partition('.')[0]}, and only the language model of a model of"
                " text and images is served: train with target_modules that leave the other out, as"
                " Unsloth does with finetune_vision_layers=False"
            )
    return ""


def too_many_layers(names: Iterable[str], num_layers: int) -> str:
    """That tensors are of layers which the base does not have; "" where none is."""
    found = [int(match[1]) for name in names if (match := _LAYER.search(name))]
    count = max(found, default=-1) + 1
    if count <= num_layers:
        return ""
    return f"it is for a model of at least {count} layers, the base has {num_layers}"


def _width(tensors: Mapping[str, torch.Tensor], base: BaseModel) -> str:
    for name, tensor in tensors.items():
        for suffix in _A:
            module = base.modules.get(name.removesuffix(suffix))
            if not name.endswith(suffix) or module is None or tensor.ndim != 2:
                continue
            if tensor.shape[1] != module.in_features:
                leaf = module.name.rpartition(".")[2]
                return (
                    f"its {leaf} takes {tensor.shape[1]} features, the base's {module.in_features}"
                )
    return ""
