"""The memory of a model, as computed from its config, against published counts and real weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders.bases.published_models import PUBLISHED, Published
from builders.bases.tiny_models import save_tiny_model
from transformers import AutoConfig

from turret.server import cli
from turret.server.models.families import read_arch
from turret.server.models.memory import memory_of
from turret.server.models.model_source import inspect_model
from turret.server.models.weights.nf4 import Nf4Weight

# The published counts of models with a vision tower include the tower.
COUNTED = [one for one in PUBLISHED if one.num_parameters and "vision_config" not in one.config]


@pytest.mark.parametrize("published", COUNTED, ids=lambda one: one.repository)
def test_the_parameters_are_those_of_the_published_model(
    published: Published, tmp_path: Path
) -> None:
    arch = read_arch(AutoConfig.from_pretrained(published.write(tmp_path)))
    assert memory_of(arch).base_wide / 2 == pytest.approx(published.num_parameters, rel=0.002)


def test_quantised_weights_take_the_computed_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One layer whose vocabulary is too small to count."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    config = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 1, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2}))
    assert cli.main(["model", "inspect", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    shapes = [(512, 512), (128, 512), (128, 512), (512, 512)]
    shapes += [(1024, 512), (1024, 512), (512, 1024)]
    weights = [Nf4Weight.quantize(torch.randn(shape)) for shape in shapes]
    tensors = [
        t for number, one in enumerate(weights) for t in one.to_tensors(str(number)).values()
    ]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert said["base"] == pytest.approx(held, rel=0.03)
    assert said["kv_per_token"] == 2 * 2 * 64 * 2
    assert said["adapter_per_rank"] == 2 * sum(out + inner for out, inner in shapes)
    # These need the names of the modules, which only the weights have.
    for flags in ["--skip-modules", "q_proj"], ["--quantize-all"]:
        assert cli.main(["model", "inspect", str(tmp_path), *flags]) == 1


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"model_type": "gpt_oss", "num_local_experts": 1 << 31}, "num_local_experts"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"hidden_act": 5}, "hidden_act"),
    ],
)
def test_an_invalid_config_is_refused_by_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], key: str
) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["model", "inspect", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert key in line


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"pad_token_id": True}, "pad_token_id"),
        ({"dtype": "x"}, "'x'"),
        ({"layer_types": -1}, "int"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0, "factor": 10**30}}, "int"),
    ],
)
def test_a_config_that_transformers_rejects_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], key: str
) -> None:
    """The model has weights, so its modules are listed, too."""
    model = save_tiny_model("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    assert cli.main(["model", "inspect", str(model)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert key in line


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe", "mixtral"])
def test_modules_in_16_bits_are_counted_as_such(family: str, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path / "model")
    arch = read_arch(AutoConfig.from_pretrained(tmp_path / "model"))
    kept = inspect_model(tmp_path / "model", tmp_path, skip_modules=["model"]).storage()
    assert memory_of(arch, kept).base == memory_of(arch).base_wide
    some = {"o_proj": kept["o_proj"]}
    assert memory_of(arch).base < memory_of(arch, some).base < memory_of(arch).base_wide


def test_a_directory_without_a_model_is_rejected(tmp_path: Path) -> None:
    assert cli.main(["model", "inspect", str(tmp_path)]) == 1
