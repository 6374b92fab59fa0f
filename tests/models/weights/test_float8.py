"""Checkpoints in 8-bit floats, converted to NF4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import save_tiny_model
from safetensors.torch import load_file, save_file
from said import says
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from turret.server.errors import InvalidRequestError
from turret.server.models.model_source import ModelSource, dequantize_float8, resolve_model
from turret.server.models.sources.check import default_cache_dir
from turret.server.models.sources.model_directory import scale_block

WEIGHTS = "model.safetensors"
# The largest number of E4M3.
LARGEST = 448.0


class Quantizer:
    """The parts of a quantizer that transformers' dequantisation uses."""

    def __init__(self, block: tuple[int, int] | None) -> None:
        self.quantization_config = FineGrainedFP8Config()
        self.quantization_config.weight_block_size = block  # type: ignore[assignment]


def packed(weight: torch.Tensor, block: tuple[int, int] | None) -> tuple[Any, torch.Tensor]:
    """The codes of a weight, and its scale or its blocks' scales."""
    weight = weight.float()
    if block is None:
        scale = weight.abs().max() / LARGEST
        return (weight / scale).to(torch.float8_e4m3fn), scale
    rows, columns = block
    scales = torch.stack(
        [
            torch.stack([part.abs().max() / LARGEST for part in row.split(columns, 1)])
            for row in weight.split(rows, 0)
        ]
    )
    spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    spread = spread[: weight.shape[0], : weight.shape[1]]
    return (weight / spread).to(torch.float8_e4m3fn), scales


def pack(
    folder: Path, block: tuple[int, int] | None, names: tuple[str, str], quantization: Any
) -> dict[str, torch.Tensor]:
    """Pack the linear modules of a checkpoint; returns the represented weights."""
    scale_name, activation_name = names
    found, meant = {}, {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        meant[name] = found[name] = tensor
        if name.endswith("_proj.weight"):
            found[name], scale = packed(tensor, block)
            found[name + scale_name] = scale
            module = name.removesuffix(".weight")
            found[module + activation_name] = torch.tensor(0.5)
            meant[name] = dequantize_float8(found[name], scale, block).to(torch.bfloat16)
            if module.endswith(("k_proj", "v_proj")):
                found[f"{module}.{module[-6]}_scale"] = torch.tensor(1.5)
    save_file({name: t.contiguous() for name, t in found.items()}, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize("block", [None, (16, 16), (24, 40)])
def test_float8_values_match_transformers(block: tuple[int, int] | None) -> None:
    codes, scale = packed(torch.randn(96, 80), block)
    theirs: Any = Fp8Dequantize(Quantizer(block))
    grid = scale.reshape(1, 1) if block is None else scale
    expected = theirs._dequantize_one(codes, grid, torch.float32)
    torch.testing.assert_close(dequantize_float8(codes, scale, block), expected, rtol=0, atol=0)


def test_blocks_at_the_edges_are_smaller() -> None:
    weight = torch.randn(90, 70)
    codes, scales = packed(weight, (32, 32))
    found = dequantize_float8(codes, scales, (32, 32))
    assert scales.shape == (3, 3)
    torch.testing.assert_close(found[64:, 64:], codes[64:, 64:].float() * scales[2, 2])
    assert (found - weight).abs().max() < 0.05 * weight.abs().max()
    rows = torch.rand(90)
    for shape in ((90,), (90, 1)):
        found = dequantize_float8(codes, rows.reshape(shape), None)
        torch.testing.assert_close(found, codes.float() * rows[:, None])
    with pytest.raises(ValueError, check=says("SCALES_MISMATCH", found=[3, 3])):
        dequantize_float8(codes, scales, (32, 64))


STATIC = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 48]}


@pytest.mark.parametrize(
    ("architecture", "names", "quantization"),
    [
        # Ministral 3 as released, with an ignored vision tower.
        ("mistral3", ("_scale_inv", ".activation_scale"), STATIC),
        ("qwen3_moe", ("_scale_inv", ".activation_scale"), BLOCKS),
        ("llama", ("_scale", ".input_scale"), {"quant_method": "fp8"}),
    ],
)
def test_a_float8_model_equals_the_model_of_its_values(
    architecture: str,
    names: tuple[str, str],
    quantization: dict[str, Any],
    tmp_path: Path,
    tiny_model: Any,
) -> None:
    plain = tiny_model(architecture)
    folder = save_tiny_model(architecture, tmp_path / "packed")
    block = scale_block({"quantization_config": quantization})
    meant = pack(folder, block, names, quantization)
    assert any("_scale" in name for name in load_file(folder / WEIGHTS))
    save_file({name: t.contiguous() for name, t in meant.items()}, plain / WEIGHTS)
    assert resolve(folder).digest == resolve(plain).digest


def resolve(folder: Path) -> ModelSource:
    return resolve_model(folder, default_cache_dir())


def test_incomplete_weights_are_rejected(tiny_model: Any) -> None:
    folder = tiny_model("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    pack(folder, None, ("_scale_inv", ".activation_scale"), BLOCKS)
    tensors = load_file(folder / WEIGHTS)

    def refused(reason: str, **changes: torch.Tensor) -> None:
        save_file({**tensors, **changes}, folder / WEIGHTS)
        with pytest.raises(InvalidRequestError, match=r"q_proj\.weight", check=says(reason)):
            resolve(folder)

    refused("TENSOR_INVALID", **{f"{name}_scale_inv": torch.ones(2, 2)})
    del tensors[f"{name}_scale_inv"]
    refused("SCALE_MISSING")
    for sizes in (128, [128], [0, 1], ["a", 2]):
        with pytest.raises(InvalidRequestError, check=says("BLOCK_SIZE_INVALID")):
            scale_block({"quantization_config": {"weight_block_size": sizes}})
