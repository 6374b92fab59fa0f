"""Writes adapters with random weights, in PEFT's layout, for any base; same seed, same weights."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from turret.server.models.decoding.arch import Arch
from turret.server.models.describe import describe_base
from turret.server.models.loader import load_decoder
from turret.server.models.model_source import ModelSource

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
# The last token of this kind in a prompt invokes the aLoRA: `<|im_start|>` of ChatML, which opens
# the answer.
INVOCATION = 1
# With this spread, an update of rank 16 is about a fifth of the base result: enough to change the
# tokens, and too little to make the model overflow.
_SPREAD = 0.05
_FEEDFORWARD = "down_proj"
# PEFT's default sizes.
_RANK, _SPARSE_RANK, _PIECE, _OFT_BLOCK, _ROAD_GROUP, _LARGEST_CIRCLE = 8, 32, 64, 32, 64, 256

Tensors = dict[str, torch.Tensor]
Keys = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Site:
    """A linear module of the base, and the adapter that is drawn for it.

    Attributes:
        path: The path of the module in its layer.
        out, inner: The numbers of outputs and inputs of the module.
        rank: The rank of the adapter.
        draw: Draws from the normal distribution.
        norms: The row norms of the module's weight.
        circle: The size of C3A's block.
    """

    path: str
    out: int
    inner: int
    rank: int
    draw: Callable[..., torch.Tensor]
    norms: torch.Tensor | None = None
    circle: int = 1


def _low_rank(s: Site) -> Tensors:
    a = s.draw(s.rank, s.inner) / s.inner**0.5
    return {"lora_A.weight": a, "lora_B.weight": s.draw(s.out, s.rank) * _SPREAD}


def _dora(s: Site) -> Tensors:
    assert s.norms is not None
    magnitude = s.norms * (1.0 + _SPREAD * s.draw(s.out))
    return {**_low_rank(s), "lora_magnitude_vector": magnitude}


def _adalora(s: Site) -> Tensors:
    a, b = _low_rank(s).values()
    return {"lora_A": a, "lora_B": b, "lora_E": s.draw(s.rank, 1)}


def _loha(s: Site) -> Tensors:
    tensors = {}
    for which in ("w1", "w2"):
        tensors[f"hada_{which}_a"] = s.draw(s.out, s.rank) * _SPREAD**0.5
        right = s.draw(s.rank, s.inner) / (s.rank**2 * s.inner) ** 0.25
        tensors[f"hada_{which}_b"] = right
    return tensors


def _lokr(s: Site) -> Tensors:
    """PEFT's default split: factors near the root, the second of low rank if that is smaller."""
    (rows1, rows2), (columns1, columns2) = map(_split, (s.out, s.inner))
    tensors = {"lokr_w1": s.draw(rows1, columns1) / columns1**0.5}
    if s.rank < max(rows2, columns2) / 2:
        tensors["lokr_w2_a"] = s.draw(rows2, s.rank) * _SPREAD
        tensors["lokr_w2_b"] = s.draw(s.rank, columns2) / columns2**0.5
    else:
        tensors["lokr_w2"] = s.draw(rows2, columns2) * _SPREAD
    return tensors


def _split(size: int) -> tuple[int, int]:
    """The two most nearly equal factors of a size, the smaller one first."""
    small = next(m for m in range(math.isqrt(size), 0, -1) if size % m == 0)
    return small, size // small


def _ia3(s: Site) -> Tensors:
    shape = (1, s.inner) if s.path.endswith(_FEEDFORWARD) else (s.out, 1)
    return {"ia3_l": 1.0 + _SPREAD * s.draw(*shape)}


def _vera(s: Site) -> Tensors:
    return {"vera_lambda_b": s.draw(s.out) * _SPREAD, "vera_lambda_d": s.draw(s.rank)}


def _oft(s: Site) -> Tensors:
    entries = _OFT_BLOCK * (_OFT_BLOCK - 1) // 2
    return {"oft_R.weight": _SPREAD / 2 * s.draw(s.inner // _OFT_BLOCK, entries)}


def _shira(s: Site) -> Tensors:
    count = s.rank * (s.out + s.inner)
    places = s.draw(s.out * s.inner).topk(count).indices.sort().values
    rows = torch.stack((places // s.inner, places % s.inner)).int()
    return {"shira_weight": _SPREAD / 2 * s.draw(count), "shira_indices": rows}


def _c3a(s: Site) -> Tensors:
    shape = (s.out // s.circle, s.inner // s.circle, s.circle)
    return {"c3a_kernel": _SPREAD * s.inner**0.5 * s.draw(*shape)}


def _road(s: Site) -> Tensors:
    half = s.out // 2
    return {"road_alpha": 1.0 + _SPREAD * s.draw(half), "road_theta": _SPREAD * s.draw(half)}


def _lora_keys(rank: int, **more: Any) -> Keys:
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", **more}


# Method → its config entries by rank, with a scale of 1, and a module's tensors.
_OF_RANK: Mapping[str, tuple[Callable[[int], Keys], Callable[[Site], Tensors]]] = {
    "lora": (_lora_keys, _low_rank),
    "rslora": (lambda r: {**_lora_keys(r, use_rslora=True), "lora_alpha": r**0.5}, _low_rank),
    "dora": (lambda r: _lora_keys(r, use_dora=True), _dora),
    "loha": (lambda r: {"peft_type": "LOHA", "r": r, "alpha": r}, _loha),
    "lokr": (lambda r: {"peft_type": "LOKR", "r": r, "alpha": r}, _lokr),
    "ia3": (lambda r: {"peft_type": "IA3", "feedforward_modules": [_FEEDFORWARD]}, _ia3),
    "adalora": (
        lambda r: {"peft_type": "ADALORA", "r": r, "init_r": r, "lora_alpha": r},
        _adalora,
    ),
    "vera": (
        lambda r: {"peft_type": "VERA", "r": r, "save_projection": True, "projection_prng_key": 0},
        _vera,
    ),
}
_PROMPTS = {
    "prefix_tuning": "PREFIX_TUNING",
    "prompt_tuning": "PROMPT_TUNING",
    "p_tuning": "P_TUNING",
}
MIXED_METHODS = (*_OF_RANK, *_PROMPTS)
# Method → its rank, config entries and tensors, in PEFT's default sizes.
_DEFAULT: Mapping[str, tuple[int, Keys, Callable[[Site], Tensors]]] = {
    "oft": (
        0,
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
    "shira": (_SPARSE_RANK, {"peft_type": "SHIRA", "r": _SPARSE_RANK}, _shira),
    "hra": (
        _RANK,
        {"peft_type": "HRA", "r": _RANK, "apply_GS": False},
        lambda s: {"hra_u": s.draw(s.inner, s.rank)},
    ),
    "miss": (
        _PIECE,
        {"peft_type": "MISS", "r": _PIECE, "mini_r": 1, "init_weights": True},
        lambda s: {"miss_block": _SPREAD / 4 * s.draw(s.rank, s.out)},
    ),
    "c3a": (0, {"peft_type": "C3A"}, _c3a),
    "road": (0, {"peft_type": "ROAD", "group_size": _ROAD_GROUP, "variant": "road_1"}, _road),
    "alora": (_RANK, _lora_keys(_RANK, alora_invocation_tokens=[INVOCATION]), _low_rank),
}
DEFAULT_METHODS = tuple(_DEFAULT)


def _drawing(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def _sites(arch: Arch, targets: Sequence[str] = ALL) -> list[tuple[str, int, int]]:
    entries = [entry for group in arch.linears().values() for entry in group]
    return [entry for entry in entries if entry[0].rpartition(".")[2] in targets]


def _write_modules(
    folder: Path,
    keys: Keys,
    make: Callable[[Site], Tensors],
    *,
    arch: Arch,
    base_model: str,
    rank: int,
    seed: int,
    targets: Sequence[str] = ALL,
    norms: Mapping[str, torch.Tensor] | None = None,
    shared: Callable[[Callable[..., torch.Tensor]], Tensors] | None = None,
) -> None:
    """Writes one adapter for the same projections of every layer."""
    draw = _drawing(seed)
    circle = keys.get("block_size", 1)
    tensors: Tensors = {}
    sites = _sites(arch, targets)
    for layer in range(arch.num_layers):
        for path, out, inner in sites:
            name = f"model.layers.{layer}.{path}"
            found = None if norms is None else norms.get(name)
            for role, tensor in make(Site(path, out, inner, rank, draw, found, circle)).items():
                tensors[f"base_model.model.{name}.{role}"] = tensor
    if shared is not None:
        tensors |= shared(draw)
    names = sorted(path.rpartition(".")[2] for path, _, _ in sites)
    _write(folder, base_model, {**keys, "target_modules": names}, tensors)


def _write(folder: Path, base_model: str, keys: Keys, tensors: Tensors) -> None:
    config = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **keys,
    }
    halves = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in halves.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_random_lora(
    folder: Path,
    *,
    arch: Arch,
    base_model: str,
    rank: int,
    seed: int,
    targets: Sequence[str] = ALL,
) -> None:
    """Writes one LoRA of scale 1 for the projections of these names in every layer."""
    like = {"arch": arch, "base_model": base_model, "rank": rank, "seed": seed}
    _write_modules(folder, _lora_keys(rank), _low_rank, **like, targets=targets)


def write_random_loras(
    root: Path, count: int, *, arch: Arch, base_model: str, rank: int
) -> list[str]:
    """Writes ``lora-00``, ``lora-01``, … below ``root``; returns their names."""
    names = [f"lora-{number:02d}" for number in range(count)]
    for seed, name in enumerate(names):
        write_random_lora(root / name, arch=arch, base_model=base_model, rank=rank, seed=seed)
    return names


def write_random_methods(
    root: Path,
    count: int,
    *,
    arch: Arch,
    base_model: str,
    rank: int,
    norms: Mapping[str, torch.Tensor],
) -> list[str]:
    """Writes ``mixed-00-lora``, ``mixed-01-rslora``, … below ``root``, the methods in turn.

    Args:
        root: The directory, created if missing.
        count: The number of adapters.
        arch: The architecture of the base.
        base_model: The base model in the adapters' configs.
        rank: The rank of every module, or the number of soft tokens or prefix positions.
        norms: The row norms of the served weights by module path, for DoRA's magnitudes.

    Returns:
        The names of the adapters.
    """
    names = []
    for number, method in zip(range(count), itertools.cycle(MIXED_METHODS), strict=False):
        name, seed = f"mixed-{number:02d}-{method.replace('_', '-')}", 1000 + number
        names.append(name)
        if method in _PROMPTS:
            keys, tensors = _prompt(method, arch, rank, _drawing(seed))
            _write(root / name, base_model, keys, tensors)
            continue
        keys_of, make = _OF_RANK[method]
        like = {"arch": arch, "base_model": base_model, "rank": rank, "seed": seed, "norms": norms}
        if method == "vera":
            like["shared"] = lambda draw: _vera_shared(arch, rank, draw)
        _write_modules(root / name, keys_of(rank), make, **like)
    return names


def _vera_shared(arch: Arch, rank: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    sites = _sites(arch)
    inputs, outputs = max(s[2] for s in sites), max(s[1] for s in sites)
    return {
        "base_model.vera_A": draw(rank, inputs) / inputs**0.5,
        "base_model.vera_B": draw(outputs, rank),
    }


def _prompt(
    method: str, arch: Arch, rank: int, draw: Callable[..., torch.Tensor]
) -> tuple[Keys, Tensors]:
    is_prefix = method == "prefix_tuning"
    width = arch.num_kv_heads * arch.head_dim if is_prefix else arch.hidden_size
    keys = {
        "peft_type": _PROMPTS[method],
        "num_virtual_tokens": rank,
        "token_dim": width,
        "num_layers": arch.num_layers,
        "num_attention_heads": arch.num_kv_heads if is_prefix else arch.num_heads,
        "num_transformer_submodules": 1,
    }
    if is_prefix:
        return keys, {"prompt_embeddings": draw(rank, 2 * arch.num_layers * width)}
    return keys, {"prompt_embeddings": draw(rank, width) * _SPREAD}


def write_default_methods(root: Path, count: int, *, arch: Arch, base_model: str) -> list[str]:
    """Writes ``default-00-oft``, ``default-01-shira``, … below ``root``, the methods in turn.

    The sizes of the base's modules are multiples of 64.

    Returns:
        The names of the adapters.
    """
    names = []
    for number, method in zip(range(count), itertools.cycle(DEFAULT_METHODS), strict=False):
        rank, keys, make = _DEFAULT[method]
        if method == "c3a":
            keys = {**keys, "block_size": _circle(arch)}
        names.append(f"default-{number:02d}-{method}")
        like = {"arch": arch, "base_model": base_model, "rank": rank, "seed": 2000 + number}
        _write_modules(root / names[-1], keys, make, **like)
    return names


def _circle(arch: Arch) -> int:
    """The size of C3A's block: the largest number up to 256 that divides all sizes of modules."""
    sides = {side for _, *pair in _sites(arch) for side in pair}
    fits = [size for size in range(1, _LARGEST_CIRCLE + 1) if all(s % size == 0 for s in sides)]
    return fits[-1]


def row_norms(model: ModelSource) -> dict[str, torch.Tensor]:
    """The row norms of the served weights, by module path."""
    decoder = load_decoder(model, dtype=torch.bfloat16, device=torch.device("cpu"))
    modules = describe_base(decoder, model).modules
    return {name: module.dequantize().norm(dim=1) for name, module in modules.items()}
