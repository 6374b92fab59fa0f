"""Checkpoints with all experts of a layer in one tensor: plain, MXFP4, and partly 4-bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import save_tiny_model, served_weights
from safetensors.torch import load_file, save_file
from said import says
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from turret.server.errors import InvalidRequestError
from turret.server.models.model_source import resolve_model
from turret.server.models.weights.nf4_experts import dequantize_mxfp4

WEIGHTS = "model.safetensors"
EXPERTS = "model.layers.1.mlp.experts"
Tensors = dict[str, torch.Tensor]


def random_codes(out: int, inner: int, *lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out + inner)
    shape = (*lead, out, inner // 32)
    codes = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(119, 125, shape, generator=generator, dtype=torch.uint8)
    return codes, exponents


def change(folder: Path, edit: Callable[[Tensors], Any], **config: Any) -> Path:
    """Edit the tensors of a directory, and its config."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return save_tiny_model("gpt_oss", tmp_path / "model")


def cached(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache" / "turret").glob(f"nf4-*/{WEIGHTS}")
    return file


def same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_mxfp4_is_dequantised_as_transformers_does() -> None:
    codes, exponents = random_codes(64, 96, 3)
    found = torch.stack([dequantize_mxfp4(*pair) for pair in zip(codes, exponents, strict=True)])
    expected = convert_moe_packed_tensors(codes, exponents, dtype=torch.bfloat16)
    assert torch.equal(found, expected.mT)
    assert torch.equal(found.signbit(), expected.mT.signbit())


@pytest.mark.parametrize("exponent", [0, 1, 127, 250, 252])
def test_every_code_is_exact(exponent: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    found = dequantize_mxfp4(codes, torch.full((1, 16), exponent, dtype=torch.uint8))
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = torch.cat((magnitudes, -magnitudes)) * 2.0 ** (exponent - 127)
    expected = torch.stack((values.repeat(16), values.repeat_interleave(16)), -1).view(1, -1)
    assert torch.equal(found.double(), expected)


def test_an_mxfp4_checkpoint_is_the_plain_one_that_it_stands_for(
    plain: Path, tmp_path: Path
) -> None:
    """Codes and exponents may be in different files."""
    packed = shutil.copytree(plain, tmp_path / "packed")
    shards: dict[str, Tensors] = {"a": {}, "b": {}}

    def to_codes(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "s.down_proj"))]:
            count, inner, out = tensors.pop(name).shape
            codes, exponents = random_codes(out, inner, count)
            shards["a"][f"{name}_scales"], shards["b"][f"{name}_blocks"] = exponents, codes
        shards["a"].update(tensors)

    change(packed, to_codes, quantization_config={"quant_method": "mxfp4"})
    (packed / WEIGHTS).unlink()
    for shard, tensors in shards.items():
        save_file(tensors, packed / f"{shard}.safetensors")
    index = {name: f"{s}.safetensors" for s, tensors in shards.items() for name in tensors}
    (packed / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))

    def to_numbers(tensors: Tensors) -> None:
        for name, codes in shards["b"].items():
            stem = name.removesuffix("_blocks")
            tensors[stem] = convert_moe_packed_tensors(codes, shards["a"][f"{stem}_scales"])

    change(plain, to_numbers)
    one, other = (resolve_model(folder, tmp_path / "cache") for folder in (packed, plain))
    assert one.digest == other.digest
    assert one.weights != other.weights
    same(served_weights(packed, torch.bfloat16), served_weights(plain, torch.bfloat16))


def test_a_4bit_checkpoint_is_taken_with_experts_in_either_form(
    plain: Path, tmp_path: Path
) -> None:
    """Experts are quantised modules with a renamed router, or unchanged."""
    expected = served_weights(plain, torch.float32)
    quantised, stacked = load_file(cached(tmp_path)), load_file(plain / WEIGHTS)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}

    def to_modules(tensors: Tensors) -> None:
        tensors.clear()
        for name, tensor in quantised.items():
            tensors[name.replace(".router.", ".router.linear.")] = tensor

    def to_mixed(tensors: Tensors) -> None:
        tensors.clear()
        tensors.update({k: t for k, t in quantised.items() if ".experts." not in k})
        tensors.update({k: t for k, t in stacked.items() if ".experts." in k})

    # The modules that are left in 16 bits are served in 16 bits.
    left = {
        name: t.mT.float() for name, t in stacked.items() if name.endswith(".experts.down_proj")
    }
    left |= {n: t.mT.float() for n, t in stacked.items() if n.endswith(".experts.gate_up_proj")}
    for number, (edit, others) in enumerate(((to_modules, {}), (to_mixed, left))):
        folder = shutil.copytree(plain, tmp_path / str(number))
        change(folder, edit, quantization_config=config)
        same(served_weights(folder, torch.float32), expected | others)
    assert len(left) == 4


def put(name: str, *pairs: tuple[str, torch.Tensor]) -> Callable[[Tensors], Any]:
    """Replace a tensor with others, by their suffixes."""

    def edit(tensors: Tensors) -> None:
        tensors.pop(name, None)
        tensors.update({name + suffix: tensor for suffix, tensor in pairs})

    return edit


DOWN = f"{EXPERTS}.down_proj"
CODES, SCALES = random_codes(128, 192, 6)
FAULTS: dict[str, tuple[Callable[[Tensors], Any], Callable[[BaseException], bool]]] = {
    "codes": (
        lambda t: t.update({"model.layers.0.self_attn.o_proj.weight_blocks": t["x"].byte()}),
        says("TENSORS_UNEXPECTED", names="model.layers.0.self_attn.o_proj.weight_blocks"),
    ),
    "scales": (put(DOWN, ("_blocks", CODES)), says("TENSOR_MISSING", name=f"{DOWN}_scales")),
    "blocks": (
        lambda t: t.update({f"{DOWN}_scales": SCALES}),
        says("TENSOR_MISSING", name=f"{DOWN}_blocks"),
    ),
    "twice": (
        lambda t: t.update({f"{DOWN}_scales": SCALES, f"{DOWN}_blocks": CODES}),
        says("TENSORS_DUPLICATE"),
    ),
    "one scale for all": (
        put(DOWN, ("_blocks", CODES), ("_scales", SCALES[:, :, :1].clone())),
        says("NOT_MXFP4", name=f"{DOWN}_blocks", scales="uint8 [128, 1]"),
    ),
    "no codes": (
        put(DOWN, ("_blocks", CODES.int()), ("_scales", SCALES)),
        says("NOT_MXFP4", name=f"{DOWN}_blocks", found="int32 [128, 6, 16]"),
    ),
    "flat": (
        put(DOWN, ("", torch.ones(6, 192))),
        says("EXPERT_SHAPE_UNSUPPORTED", name=DOWN, found="float32 [192]"),
    ),
    "a number": (put(DOWN, ("", torch.ones(()))), says("EXPERTS_MISMATCH", name=DOWN, found=0)),
    "fewer": (
        lambda t: t.update({DOWN: t[DOWN][:5]}),
        says("EXPERTS_MISMATCH", name=DOWN, found=5, expected=6),
    ),
    "more": (
        lambda t: t.update({DOWN: torch.cat((t[DOWN], t[DOWN][:1]))}),
        says("EXPERTS_MISMATCH", name=DOWN, found=7, expected=6),
    ),
}
# Tensors that a plain checkpoint does not quantise; errors appear when it is loaded.
UNFIT = (
    "self_attn.sinks",
    "self_attn.q_proj.bias",
    "mlp.router.weight",
    "mlp.router.bias",
    "mlp.experts.gate_up_proj_bias",
)


@pytest.mark.parametrize("name", UNFIT)
def test_a_tensor_of_another_shape_is_named(name: str, plain: Path) -> None:
    key = f"model.layers.1.{name}"
    # Remove a row, a head or a feature; each expert's bias loses one value.
    change(plain, lambda t: t.update({key: t[key][:, :-1] if t[key].ndim == 2 else t[key][:-1]}))
    found = name.replace("gate_up_proj_bias", "gate_up_projs.0.bias")
    with pytest.raises(InvalidRequestError, match=rf"{found} ", check=says("SHAPE_MISMATCH")):
        served_weights(plain, torch.float32)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_is_named(fault: str, plain: Path, tmp_path: Path) -> None:
    edit, check = FAULTS[fault]

    def plant(tensors: Tensors) -> None:
        tensors["x"] = torch.ones(2)
        edit(tensors)
        del tensors["x"]

    change(plain, plant)
    with pytest.raises(InvalidRequestError, check=check):
        resolve_model(plain, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("nf4-*")) == []
