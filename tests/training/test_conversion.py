"""``turret convert`` compared with PEFT: the update of every module, and rejections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders.adapters import BASE_NAME, edit_config, edit_tensors, linear_modules, tiny_llama
from builders.methods import load_adapter, quiet, save_adapter
from peft.tuners.psoft.layer import OrthLayer
from torch import nn
from transformers.utils import logging

from turret.server.cli import main
from turret.training.conversion import psoft
from turret.training.conversion.converter import CONVERTED
from turret.training.conversion.kinds import KINDS
from turret.training.words import say

PSOFT = [
    {"r": 4},
    {"r": 6, "psoft_alpha": 9, "ab_svd_init": "pissa_init", "psoft_mag_b": False},
    {"r": 6, "psoft_svd": "lowrank", "random_seed": 5, "psoft_orth": False, "psoft_mag_a": False},
    {"r": 6, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5},
]
ADAMSS = [
    {"r": 16, "num_subspaces": 3, "subspace_rank": 2},
    {"r": 24, "num_subspaces": 6, "subspace_rank": 4, "random_seed": 3},
    # Fewer vectors than the sum of all clusters' ranks.
    {"r": 5, "num_subspaces": 6, "subspace_rank": 4, "use_dynamic_rank": True},
]
CASES = [*((peft.PsoftConfig, c) for c in PSOFT), *((peft.AdamssConfig, c) for c in ADAMSS)]


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    logging.disable_progress_bar()


def make(kind: Any, root: Path, *, model: nn.Module | None = None, **values: Any) -> nn.Module:
    """Write a model to ``root/base``, and its adapter to ``root/a``."""
    model = tiny_llama(attention_bias=True) if model is None else model
    model.save_pretrained(root / "base")  # type: ignore[operator]
    targets = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    with quiet():
        config = kind(**targets, **values)
    save_adapter(model, config, root / "a", strength=0.3)
    return model


def convert(root: Path, *more: str) -> int:
    places = ("--base", str(root / "base"), "--output", str(root / "lora"))
    return main(["convert", str(root / "a"), *places, *more])


@torch.no_grad()
def worst_error(model: nn.Module, root: Path) -> float:
    """The largest relative error of the LoRA's updates, compared with PEFT's in float32."""
    theirs, ours = (load_adapter(model, root / name) for name in ("a", "lora"))
    errors = []
    for name, linear in linear_modules(model).items():
        path = f"base_model.model.{name}"
        if name.endswith(("q_proj", "down_proj")):
            x = torch.randn(16, linear.in_features, generator=torch.Generator().manual_seed(3))
            base = linear(x)
            wanted = theirs.get_submodule(path)(x) - base
            found = ours.get_submodule(path)(x) - base
            errors.append(float((found - wanted).norm() / wanted.norm()))
    assert len(errors) == 4
    return max(errors)


@pytest.mark.parametrize(("kind", "values"), CASES, ids=lambda v: getattr(v, "__name__", None))
def test_the_converted_lora_equals_the_adapter(
    kind: Any, values: dict[str, Any], tmp_path: Path
) -> None:
    model = make(kind, tmp_path, **values)
    assert convert(tmp_path) == 0
    assert worst_error(model, tmp_path) < 1e-5
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert config["base_model_name_or_path"] is not None


def test_a_base_in_bf16(tmp_path: Path) -> None:
    """PEFT decomposes the rounded weights, and rounds AdaMSS's stored vectors."""
    model = tiny_llama(attention_bias=True)
    make(peft.AdamssConfig, tmp_path, model=model.to(torch.bfloat16), **ADAMSS[0])  # type: ignore[call-arg]
    assert convert(tmp_path) == 0
    oracle = load_adapter(model, tmp_path / "a").get_submodule(
        "base_model.model.model.layers.1.self_attn.q_proj"
    )
    lora = load_adapter(model, tmp_path / "lora").get_submodule(
        "base_model.model.model.layers.1.self_attn.q_proj"
    )
    factors = (lora.lora_B["default"].weight, lora.lora_A["default"].weight)  # type: ignore[index]
    wide = [factor.detach().float() for factor in factors]  # type: ignore[union-attr]
    wanted = oracle.float().get_delta_weight("default")  # type: ignore[operator]
    assert (wide[0] @ wide[1] - wanted).norm() < 1e-5 * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize("terms", range(1, 8))
def test_every_length_of_the_series_matches_peft(terms: int) -> None:
    theirs = OrthLayer(6, use_cayley_neumann=True, num_cayley_neumann_terms=terms)
    draw = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        parameter.normal_(1.0, 0.3, generator=draw)
    roles = {f"psoft_R.{name}": tensor for name, tensor in theirs.state_dict().items()}
    config = {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms}
    found = psoft.rotation(roles, 6, {**psoft.DEFAULTS, **config})
    assert (found - theirs.get_matrix()).norm() < 1e-5 * found.norm()


# A bias makes the decomposed weight wider than high.
@pytest.mark.parametrize("has_bias", [True, False])
def test_clusters_are_recovered_if_the_seed_is_wrong(has_bias: bool, tmp_path: Path) -> None:
    model = tiny_llama(attention_bias=has_bias)
    make(peft.AdamssConfig, tmp_path, model=model, **ADAMSS[1])
    edit_config(tmp_path / "a", random_seed=...)
    assert convert(tmp_path) == 0
    edit_config(tmp_path / "a", random_seed=3)
    assert worst_error(model, tmp_path) < 1e-5


def test_whole_modules_are_copied(tmp_path: Path) -> None:
    model = make(peft.PsoftConfig, tmp_path, r=4, modules_to_save=["lm_head"])
    assert convert(tmp_path) == 0
    heads = [
        load_adapter(model, tmp_path / name).get_submodule("base_model.model.lm_head")
        for name in ("a", "lora")
    ]
    x = torch.randn(3, 64)
    assert torch.equal(heads[0](x), heads[1](x))
    assert not torch.equal(heads[0](x), model.get_submodule("lm_head")(x))


def test_a_missing_package_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(peft.AdamssConfig, tmp_path, **ADAMSS[0])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert convert(tmp_path) == 1
    assert "scikit-learn" in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()


def test_a_different_base_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(peft.AdamssConfig, tmp_path, **ADAMSS[0])
    tiny_llama(attention_bias=True, seed=1).save_pretrained(tmp_path / "base")
    assert convert(tmp_path) == 1
    path = "model.layers.0.mlp.down_proj"
    assert str(say("ADAMSS_OTHER_WEIGHT", path=path)) in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()
    assert not list(tmp_path.glob(".converting*"))


def test_clusters_of_different_sizes_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(peft.AdamssConfig, tmp_path, **ADAMSS[0])

    def move_a_row(tensors: dict[str, torch.Tensor]) -> None:
        first, second = (
            f"base_model.model.model.layers.0.self_attn.q_proj.adamss_B.{i}" for i in (0, 1)
        )
        tensors[second] = torch.cat((tensors[second], tensors[first][-1:]))
        tensors[first] = tensors[first][:-1].contiguous()

    edit_tensors(tmp_path / "a", move_a_row)
    assert convert(tmp_path) == 1
    words, _, _ = say("ADAMSS_CLUSTERS", name="N", expected="X", found="Y").partition(" X ")
    assert words.removeprefix("N") in capsys.readouterr().err


def test_more_clusters_than_outputs_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(peft.AdamssConfig, tmp_path, **ADAMSS[0])
    edit_config(tmp_path / "a", num_subspaces=70)
    module = "base_model.model.model.layers.0.self_attn.q_proj"

    def add_empty_ones(tensors: dict[str, torch.Tensor]) -> None:
        for i in range(3, 70):
            tensors[f"{module}.adamss_A.{i}"] = torch.ones(1, 16)
            tensors[f"{module}.adamss_B.{i}"] = torch.ones(0, 1)

    edit_tensors(tmp_path / "a", add_empty_ones)
    assert convert(tmp_path) == 1
    # A single line for all clusters follows the progress.
    doing, said = capsys.readouterr().err.splitlines()
    assert doing.startswith("convert: ")
    assert "q_proj" in said
    assert "64" in said


def test_too_many_clusters_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(peft.AdamssConfig, tmp_path, **ADAMSS[0])
    edit_config(tmp_path / "a", num_subspaces=5000)
    assert convert(tmp_path) == 1
    assert "num_subspaces" in capsys.readouterr().err


def test_each_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(peft.PsoftConfig, tmp_path, r=4)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine").touch()
    assert convert(tmp_path) == 1
    (tmp_path / "lora" / "mine").unlink()
    edit_config(tmp_path / "a", psoft_mag_a=False, what=1)
    assert convert(tmp_path) == 1
    edit_config(tmp_path / "a", peft_type="LORA")
    assert convert(tmp_path) == 1
    nowhere = ["convert", str(tmp_path / "b"), "--base", "x", "--output", str(tmp_path / "lora")]
    assert main(nowhere) == 1
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if not line.startswith("convert: starting")]
    # Checks beyond names and configs need torch, and print a line first.
    assert len(said) - len(lines) == 1
    assert len(lines) == 4
    places = (str(tmp_path / "lora"), "what", "LORA", str(tmp_path / "b"))
    for line, text in zip(lines, places, strict=True):
        assert line.startswith("error: ")
        assert text in line


def test_a_quantised_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(peft.PsoftConfig, tmp_path, r=4)
    file = tmp_path / "base" / "config.json"
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantized}))
    assert convert(tmp_path) == 1
    assert str(say("BASE_IS_4BIT", path=tmp_path / "base")) in capsys.readouterr().err


def test_a_base_with_another_name_causes_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(peft.PsoftConfig, tmp_path, r=4)
    edit_config(tmp_path / "a", base_model_name_or_path=BASE_NAME)
    assert convert(tmp_path) == 0
    said = capsys.readouterr()
    assert f"it was trained on base {BASE_NAME!r}" in said.err
    assert "a LoRA of 4 modules, rank 4 at most" in said.out


def test_the_kinds_of_conversion_match_those_listed_without_torch() -> None:
    assert {*KINDS} == {*CONVERTED, "XLORA"}
