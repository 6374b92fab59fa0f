"""Writes adapters of PEFT's default sizes with random weights, of methods with other operators."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from turret.server.models.decoding.arch import Arch

# The last token of this kind in a prompt invokes the aLoRA: `<|im_start|>` of ChatML, which opens
# the answer.
INVOCATION = 1
# Spread of random factors: the update is about a fifth of the base's result, as in ``random_lora``.
_SPREAD = 0.05
_RANK, _SPARSE_RANK, _PIECE, _OFT_BLOCK, _ROAD_GROUP, _LARGEST_CIRCLE = 8, 32, 64, 32, 64, 256

Tensors = dict[str, torch.Tensor]
Draw = Callable[..., torch.Tensor]


def _oft(draw: Draw, out: int, inner: int) -> Tensors:
    entries = _OFT_BLOCK * (_OFT_BLOCK - 1) // 2
    return {"oft_R.weight": _SPREAD / 2 * draw(inner // _OFT_BLOCK, entries)}


def _shira(draw: Draw, out: int, inner: int) -> Tensors:
    count = _SPARSE_RANK * (out + inner)
    places = draw(out * inner).topk(count).indices.sort().values
    rows = torch.stack((places // inner, places % inner)).int()
    return {"shira_weight": _SPREAD / 2 * draw(count), "shira_indices": rows}


def _hra(draw: Draw, out: int, inner: int) -> Tensors:
    return {"hra_u": draw(inner, _RANK)}


def _miss(draw: Draw, out: int, inner: int) -> Tensors:
    return {"miss_block": _SPREAD / 4 * draw(_PIECE, out)}


def _c3a(draw: Draw, out: int, inner: int, block: int) -> Tensors:
    kernel = _SPREAD * inner**0.5 * draw(out // block, inner // block, block)
    return {"c3a_kernel": kernel}


def _road(draw: Draw, out: int, inner: int) -> Tensors:
    return {"road_alpha": 1.0 + _SPREAD * draw(out // 2), "road_theta": _SPREAD * draw(out // 2)}


def _alora(draw: Draw, out: int, inner: int) -> Tensors:
    a, b = draw(_RANK, inner) / inner**0.5, _SPREAD * draw(out, _RANK)
    return {"lora_A.weight": a, "lora_B.weight": b}


# Config entries, and a function from (out_features, in_features) to a module's tensors.
_KINDS: Mapping[str, tuple[dict[str, Any], Callable[..., Tensors]]] = {
    "oft": (
        {
            "peft_type": "OFT",
            "oft_block_size": _OFT_BLOCK,
            "r": 0,
            "block_share": False,
            "coft": False,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 5,
            "peft_version": "0.19.0",
        },
        _oft,
    ),
    "shira": ({"peft_type": "SHIRA", "r": _SPARSE_RANK}, _shira),
    "hra": ({"peft_type": "HRA", "r": _RANK, "apply_GS": False}, _hra),
    "miss": ({"peft_type": "MISS", "r": _PIECE, "mini_r": 1, "init_weights": True}, _miss),
    "c3a": ({"peft_type": "C3A"}, _c3a),
    "road": ({"peft_type": "ROAD", "group_size": _ROAD_GROUP, "variant": "road_1"}, _road),
    "alora": (
        {
            "peft_type": "LORA",
            "r": _RANK,
            "lora_alpha": _RANK,
            "bias": "none",
            "alora_invocation_tokens": [INVOCATION],
        },
        _alora,
    ),
}
METHODS = tuple(_KINDS)


def _circle(arch: Arch) -> int:
    """C3A's block, 256 by default: the largest up to that which divides every side."""
    sides = {side for group in arch.linears().values() for _, *pair in group for side in pair}
    fits = [size for size in range(1, _LARGEST_CIRCLE + 1) if all(s % size == 0 for s in sides)]
    return fits[-1]


def write_default_method(
    folder: Path, method: str, *, arch: Arch, base_model: str, seed: int
) -> None:
    """Write one adapter on all seven projections of every layer.

    Args:
        folder: Made by this call.
        method: One of ``METHODS``.
        arch: The base's architecture; its sides are multiples of 64.
        base_model: What the adapter claims to be trained on.
        seed: Same seed, same weights.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    keys, make = _KINDS[method]
    more = {"block_size": _circle(arch)} if method == "c3a" else {}
    sizes = {"block": _circle(arch)} if method == "c3a" else {}
    tensors: Tensors = {}
    sites = [entry for group in arch.linears().values() for entry in group]
    for layer in range(arch.num_layers):
        for path, out, inner in sites:
            for role, tensor in make(draw, out, inner, **sizes).items():
                half = tensor.bfloat16() if tensor.is_floating_point() else tensor
                tensors[f"base_model.model.model.layers.{layer}.{path}.{role}"] = half.contiguous()
    config = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": sorted(path.rpartition(".")[2] for path, _, _ in sites),
        **keys,
        **more,
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_default_methods(root: Path, count: int, *, arch: Arch, base_model: str) -> list[str]:
    """Write ``default-00-oft``, ``default-01-shira``, … below ``root``, the methods in turn.

    Returns:
        Their names.
    """
    names = []
    for number, method in zip(range(count), itertools.cycle(METHODS), strict=False):
        name = f"default-{number:02d}-{method}"
        like = {"arch": arch, "base_model": base_model}
        write_default_method(root / name, method, **like, seed=2000 + number)
        names.append(name)
    return names
