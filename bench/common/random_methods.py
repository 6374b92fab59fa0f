"""Writes one adapter per served method with random weights, in PEFT's layout, for any base."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from turret.server.models.decoding.arch import Arch
from turret.server.models.describe import describe_base
from turret.server.models.loader import load_decoder
from turret.server.models.model_source import ModelSource

METHODS = (
    "lora",
    "rslora",
    "dora",
    "loha",
    "lokr",
    "ia3",
    "adalora",
    "vera",
    "prefix_tuning",
    "prompt_tuning",
    "p_tuning",
)
# An update is then about a fifth of the base result at rank 16: enough to change the tokens, too
# little to make the model overflow.
_SPREAD = 0.05
_FEEDFORWARD = "down_proj"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Site:
    """A linear module of the base: path inside the layer, sizes, and row norms of its weight."""

    path: str
    out_features: int
    in_features: int
    norms: torch.Tensor | None


class RandomFactors:
    """Draws the tensors of one adapter; ``rank`` is also the number of soft tokens."""

    def __init__(self, arch: Arch, rank: int, seed: int) -> None:
        self.arch = arch
        self.rank = rank
        self._generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    def low_rank(self, site: Site) -> Tensors:
        return {
            "lora_A.weight": self.randn(self.rank, site.in_features) / site.in_features**0.5,
            "lora_B.weight": self.randn(site.out_features, self.rank) * _SPREAD,
        }

    def dora(self, site: Site) -> Tensors:
        assert site.norms is not None
        magnitude = site.norms * (1.0 + _SPREAD * self.randn(site.out_features))
        return {**self.low_rank(site), "lora_magnitude_vector": magnitude}

    def adalora(self, site: Site) -> Tensors:
        factors = self.low_rank(site)
        return {
            "lora_A": factors["lora_A.weight"],
            "lora_B": factors["lora_B.weight"],
            "lora_E": self.randn(self.rank, 1),
        }

    def hadamard(self, site: Site) -> Tensors:
        tensors = {}
        for which in ("w1", "w2"):
            left = self.randn(site.out_features, self.rank) * _SPREAD**0.5
            tensors[f"hada_{which}_a"] = left
            tensors[f"hada_{which}_b"] = self.randn(self.rank, site.in_features)
            tensors[f"hada_{which}_b"] /= (self.rank**2 * site.in_features) ** 0.25
        return tensors

    def kronecker(self, site: Site) -> Tensors:
        """PEFT's default split: factors near the root, the second one of low rank if it is less."""
        (rows1, rows2), (columns1, columns2) = map(_split, (site.out_features, site.in_features))
        tensors = {"lokr_w1": self.randn(rows1, columns1) / columns1**0.5}
        if self.rank < max(rows2, columns2) / 2:
            tensors["lokr_w2_a"] = self.randn(rows2, self.rank) * _SPREAD
            tensors["lokr_w2_b"] = self.randn(self.rank, columns2) / columns2**0.5
        else:
            tensors["lokr_w2"] = self.randn(rows2, columns2) * _SPREAD
        return tensors

    def ia3(self, site: Site) -> Tensors:
        is_input = site.path.endswith(_FEEDFORWARD)
        shape = (1, site.in_features) if is_input else (site.out_features, 1)
        return {"ia3_l": 1.0 + _SPREAD * self.randn(*shape)}

    def vera(self, site: Site) -> Tensors:
        return {
            "vera_lambda_b": self.randn(site.out_features) * _SPREAD,
            "vera_lambda_d": self.randn(self.rank),
        }

    def vera_shared(self) -> Tensors:
        sites = [entry for group in self.arch.linears().values() for entry in group]
        inputs, outputs = max(s[2] for s in sites), max(s[1] for s in sites)
        return {
            "base_model.vera_A": self.randn(self.rank, inputs) / inputs**0.5,
            "base_model.vera_B": self.randn(outputs, self.rank),
        }

    def prefix(self) -> Tensors:
        arch = self.arch
        width = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim
        return {"prompt_embeddings": self.randn(self.rank, width)}

    def soft_tokens(self) -> Tensors:
        return {"prompt_embeddings": self.randn(self.rank, self.arch.hidden_size) * _SPREAD}


def _split(size: int) -> tuple[int, int]:
    """The two factors of a size that are nearest to each other, the smaller one first."""
    small = next(m for m in range(math.isqrt(size), 0, -1) if size % m == 0)
    return small, size // small


def write_random_method(
    folder: Path,
    method: str,
    *,
    arch: Arch,
    base_model: str,
    rank: int,
    seed: int,
    norms: Mapping[str, torch.Tensor],
) -> None:
    """Write one adapter on all seven projections of every layer.

    Args:
        folder: Made by this call.
        method: One of ``METHODS``.
        arch: The base's architecture.
        base_model: What the adapter claims to be trained on.
        rank: Of every module; soft tokens or prefix positions where there is no rank.
        seed: Same seed, same weights.
        norms: Row norms of the served weights by module path (DoRA's magnitudes are near them).
    """
    draw = RandomFactors(arch, rank, seed)
    linear: dict[str, tuple[str, Callable[[Site], Tensors]]] = {
        "lora": ("LORA", draw.low_rank),
        "rslora": ("LORA", draw.low_rank),
        "dora": ("LORA", draw.dora),
        "loha": ("LOHA", draw.hadamard),
        "lokr": ("LOKR", draw.kronecker),
        "ia3": ("IA3", draw.ia3),
        "adalora": ("ADALORA", draw.adalora),
        "vera": ("VERA", draw.vera),
    }
    prompts: dict[str, tuple[str, Callable[[], Tensors]]] = {
        "prefix_tuning": ("PREFIX_TUNING", draw.prefix),
        "prompt_tuning": ("PROMPT_TUNING", draw.soft_tokens),
        "p_tuning": ("P_TUNING", draw.soft_tokens),
    }
    config: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
    }
    tensors: Tensors = {}
    if method in prompts:
        config["peft_type"], make = prompts[method]
        tensors = make()
        config |= _prompt_keys(method, arch, rank)
    else:
        config["peft_type"], make_site = linear[method]
        sites = [entry for group in arch.linears().values() for entry in group]
        for layer in range(arch.num_layers):
            for path, out_features, in_features in sites:
                name = f"model.layers.{layer}.{path}"
                site = Site(path, out_features, in_features, norms.get(name))
                for role, tensor in make_site(site).items():
                    tensors[f"base_model.model.{name}.{role}"] = tensor
        if method == "vera":
            tensors |= draw.vera_shared()
        config["target_modules"] = sorted(path.rpartition(".")[2] for path, _, _ in sites)
        config |= _module_keys(method, rank)
    folder.mkdir(parents=True)
    halves = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
    save_file(halves, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _module_keys(method: str, rank: int) -> dict[str, Any]:
    """Config entries of a module's method, with a scale of 1 for every method."""
    if method in ("loha", "lokr"):
        return {"r": rank, "alpha": rank}
    if method == "ia3":
        return {"feedforward_modules": [_FEEDFORWARD]}
    if method == "adalora":
        return {"r": rank, "init_r": rank, "lora_alpha": rank}
    if method == "vera":
        return {"r": rank, "save_projection": True, "projection_prng_key": 0}
    alpha = rank**0.5 if method == "rslora" else rank
    keys = {"r": rank, "lora_alpha": alpha, "bias": "none"}
    return keys | {"use_rslora": method == "rslora", "use_dora": method == "dora"}


def _prompt_keys(method: str, arch: Arch, rank: int) -> dict[str, Any]:
    is_prefix = method == "prefix_tuning"
    return {
        "num_virtual_tokens": rank,
        "token_dim": arch.num_kv_heads * arch.head_dim if is_prefix else arch.hidden_size,
        "num_layers": arch.num_layers,
        "num_attention_heads": arch.num_kv_heads if is_prefix else arch.num_heads,
        "num_transformer_submodules": 1,
    }


def row_norms(model: ModelSource) -> dict[str, torch.Tensor]:
    """Row norms of the weights as served, by module path."""
    decoder = load_decoder(model, dtype=torch.bfloat16, device=torch.device("cpu"))
    modules = describe_base(decoder, model).modules
    return {name: module.dequantize().norm(dim=1) for name, module in modules.items()}


def write_random_methods(
    root: Path,
    count: int,
    *,
    arch: Arch,
    base_model: str,
    rank: int,
    norms: Mapping[str, torch.Tensor],
) -> list[str]:
    """Write ``mixed-00-lora``, ``mixed-01-rslora``, … below ``root``, the methods in turn.

    Returns:
        Their names.
    """
    names = []
    for number, method in zip(range(count), itertools.cycle(METHODS), strict=False):
        name = f"mixed-{number:02d}-{method.replace('_', '-')}"
        write_random_method(
            root / name,
            method,
            arch=arch,
            base_model=base_model,
            rank=rank,
            seed=1000 + number,
            norms=norms,
        )
        names.append(name)
    return names
