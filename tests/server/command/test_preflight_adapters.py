"""Preloaded adapters that a start rejects within a second, before torch is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import start_problems
import torch
from builders.adapters import base_of, tiny_llama
from checkout import ROOT
from safetensors.numpy import load_file, save_file
from said import says

from turret.server.adapters.base import BaseModule
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.reader import read_checkpoint
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.errors import AdapterCheckpointError

ADAPTERS = ROOT / "examples" / "adapters"


def found(*arguments: str) -> list[str]:
    """The problems of the adapter ``a``."""
    problems = start_problems.found(*arguments)
    assert {problem.field for problem in problems} <= {"adapters.preload.a"}
    return [problem.text for problem in problems]


def write_adapter(
    folder: Path, *, width: int = 576, module: str = "0.self_attn.q_proj", **config: Any
) -> Path:
    """Write a LoRA of rank 4 in PEFT's layout for the bundled model; ``config`` changes keys."""
    shapes = {
        f"base_model.model.model.layers.{module}.lora_A.weight": (4, width),
        f"base_model.model.model.layers.{module}.lora_B.weight": (width, 4),
    }
    folder.mkdir(exist_ok=True)
    values = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(values, folder / "adapter_model.safetensors")
    targets = [f"model.layers.{module}"]
    keys = {"peft_type": "LORA", "r": 4, "target_modules": targets, **config}
    if keys["peft_type"] == "LORA":
        keys.setdefault("lora_alpha", 8)
    (folder / "adapter_config.json").write_text(json.dumps(keys))
    return folder


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "LROA"}, "UNKNOWN_METHOD"),
        ({"peft_type": "PSOFT"}, "ADAPTER_UNUSABLE"),
        ({"peft_type": None}, "ADAPTER_UNUSABLE"),
        ({"r": 8}, "WRONG_RANK"),
        *(({"r": r}, "INVALID_VALUE") for r in ("four", -1, 0, 4.0, True, None)),
        *(
            ({"peft_type": kind, "r": "four"}, "INVALID_VALUE")
            for kind in ("VERA", "SHIRA", "MISS", "RANDLORA")
        ),
        ({"peft_type": "WIBBLE"}, "UNKNOWN_METHOD"),
        ({"peft_type": "LOKR", "alpha": "x"}, "INVALID_VALUE"),
        ({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}, "OTHER_BASE"),
    ],
)
def test_adapters_with_unsupported_configs(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "m", **config)
    (problem,) = found("--adapter-root", str(tmp_path), "--preload", "a=m")
    assert says(reason)(problem)


def test_adapters_that_the_host_budget_cannot_hold(tmp_path: Path) -> None:
    write_adapter(tmp_path / "m")
    weights = 2 * 4 * 576
    flags = ("--adapter-root", str(tmp_path), "--preload", "a=m", "--adapter-host-bytes")
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        held = (*flags, str(weights * size), "--dtype", dtype)
        assert found(*held) == []
        (problem,) = found(*flags, str(weights * size - 1), "--dtype", dtype)
        assert says("OVER_HOST_MEMORY", bytes=weights * size)(problem)
    (problem,) = found(*flags, "10")
    assert says("OVER_HOST_MEMORY", bytes=9216, host_bytes=10)(problem)


def test_adapters_of_another_base_if_that_is_allowed_or_uncertain(tmp_path: Path) -> None:
    flags = ("--adapter-root", str(tmp_path), "--preload", "a=m")
    folder = write_adapter(tmp_path / "m", base_model_name_or_path="meta-llama/Llama-3.1-8B")
    assert says("OTHER_BASE")(found(*flags)[0])
    assert found(*flags, "--allow-other-base") == []
    # A digest is more specific than a name, but needs the model's weights.
    (folder / "provenance.json").write_text('{"base": {"digest": "00"}}')
    assert found(*flags) == []
    write_adapter(tmp_path / "m", base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct")
    (folder / "provenance.json").unlink()
    assert found(*flags) == []


def test_adapters_whose_ranks_are_too_large(tmp_path: Path) -> None:
    flags = ("--adapter-root", str(tmp_path), "--preload", "a=m", "--max-rank", "3")
    write_adapter(tmp_path / "m")
    (problem,) = found(*flags)
    assert says("RANK_OVER_LIMIT", rank=4, max_rank=3)(problem)
    # The base determines the rank that a pattern gives a module, but the tensors have a fixed rank.
    write_adapter(tmp_path / "m", r=8, rank_pattern={"q_proj": 4})
    assert found(*flags) == [problem]
    assert found(*flags[:-1], "4") == []


@pytest.mark.parametrize(
    ("width", "module", "reason", "params"),
    [
        (64, "0.self_attn.q_proj", "WRONG_INPUTS", {"found": 64, "expected": 576}),
        (64, "29.mlp.down_proj", "WRONG_INPUTS", {"found": 64, "expected": 1536}),
        (576, "30.mlp.up_proj", "TOO_MANY_LAYERS", {"found": 31, "expected": 30}),
        (576, "0.self_attn.qkv_proj", "NO_SUCH_MODULE", {}),
        (64, "0.self_attn.other", "NO_SUCH_MODULE", {}),
    ],
)
def test_adapters_whose_shapes_differ_from_the_base(
    width: int, module: str, reason: str, params: dict[str, Any], tmp_path: Path
) -> None:
    flags = ("--adapter-root", str(tmp_path), "--preload", "a=m")
    write_adapter(tmp_path / "m", width=width, module=module)
    (problem,) = found(*flags)
    assert says("ADAPTER_MISFIT", base_model="HuggingFaceTB/SmolLM2-135M-Instruct")(problem)
    assert says(reason, **params)(problem)
    # The base's name is more specific than shapes; if any base is allowed, the shapes decide.
    write_adapter(tmp_path / "m", width=64, base_model_name_or_path="meta-llama/Llama-3.1-8B")
    assert says("OTHER_BASE", trained_for="meta-llama/Llama-3.1-8B")(found(*flags)[0])
    (problem,) = found(*flags, "--allow-other-base")
    assert says("ADAPTER_MISFIT")(problem)


def test_shapes_of_a_base_in_a_directory(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"a": np.zeros(1, np.float32)}, base / "model.safetensors")
    (base / "tokenizer.json").touch()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    flags = ("--adapter-root", str(tmp_path), "--preload", "a=m", "--model", str(base))
    write_adapter(tmp_path / "m")
    vision = {"hidden_size": 576, "model_type": "gemma3", "text_config": sizes}
    for config in ({**sizes, "model_type": "llama"}, vision):
        (base / "config.json").write_text(json.dumps(config))
        (problem,) = found(*flags)
        assert says("WRONG_INPUTS", found=576, expected=64)(problem)
    (base / "config.json").write_text('{"model_type": "llama", "hidden_size": 576}')
    assert found(*flags) == []


_Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "tensors", "field", "reason"),
    [
        ({"use_dora": True}, {}, f"{_Q}.lora_magnitude_vector", "MISSING_TENSOR"),
        (
            {},
            {f"{_Q}.lora_magnitude_vector.weight": np.ones(576, np.float32)},
            f"{_Q}.lora_magnitude_vector",
            "UNEXPECTED_TENSOR",
        ),
        ({}, {"foo.weight": np.ones(4, np.float32)}, "foo.weight", "WHOLE_WEIGHT"),
        (
            {},
            {f"{_Q}.lora_A.weight": np.ones((4, 576), np.int8)},
            f"{_Q}.lora_A.weight",
            "WRONG_DTYPE",
        ),
        (
            {"target_modules": ["proj_q"]},
            {},
            f"{_Q}.lora_A.weight",
            "UNEXPECTED_TENSOR",
        ),
        *(({"lora_alpha": v}, {}, "lora_alpha", "INVALID_VALUE") for v in ("x", None, 1e30, True)),
        ({"use_rslora": 1}, {}, "use_rslora", "INVALID_VALUE"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights", "UNSUPPORTED_VALUE"),
        ({"alpha_pattern": {"q": "x"}}, {}, "alpha_pattern", "INVALID_ENTRY"),
        ({"lora_alhpa": 8}, {}, "lora_alhpa", "UNKNOWN_FIELD"),
        ({"wibble": 8}, {}, "wibble", "UNKNOWN_FIELD"),
        (
            {"task_type": "SEQ_CLS", "lora_alpha": "x"},
            {"score.weight": np.ones((2, 576), np.float32)},
            "lora_alpha",
            "INVALID_VALUE",
        ),
        # Valid targets: all targets, a head, and a suffix of several names.
        ({"target_modules": r"model\.layers\.0\.self_attn\.q_proj"}, {}, "", ""),
        ({"task_type": "SEQ_CLS"}, {"score.weight": np.ones((2, 576), np.float32)}, "", ""),
        ({"target_modules": ["0.self_attn.q_proj"]}, {}, "", ""),
        ({"target_modules": [_Q]}, {}, "", ""),
        (
            {"use_dora": True},
            {f"{_Q}.lora_magnitude_vector": np.ones(576, np.float32)},
            "",
            "",
        ),
    ],
)
def test_loras_whose_tensors_contradict_their_config(
    config: dict[str, Any], tensors: dict[str, Any], field: str, reason: str, tmp_path: Path
) -> None:
    """Loading the same folder reports the same error."""
    folder = write_adapter(tmp_path / "m", **config)
    file = folder / "adapter_model.safetensors"
    more = {f"base_model.model.{name}": values for name, values in tensors.items()}
    save_file(load_file(file) | more, file)
    problems = found("--adapter-root", str(tmp_path), "--preload", "a=m")
    assert len(problems) == bool(field)
    if not field:
        return
    assert says("ADAPTER_UNUSABLE")(problems[0])
    assert says(reason)(problems[0])
    projection = BaseModule(_Q, 576, 576, None, lambda: torch.zeros(576, 576))
    base = dataclasses.replace(base_of(tiny_llama()), modules={_Q: projection})
    checkpoint = read_checkpoint(AdapterRoot(tmp_path), "m", max_elements=1 << 20)
    with pytest.raises(AdapterCheckpointError) as raised:
        lower_checkpoint(checkpoint, base)
    assert (field, reason) in [(name, why.reason) for name, why in raised.value.violations]


@pytest.mark.parametrize(
    ("name", "rows", "has_tokenizer"),
    [
        ("model.embed_tokens.weight", 49154, False),
        ("model.embed_tokens.base_layer.weight", 49154, False),
        ("lm_head.weight", 49154, False),
        ("lm_head.weight", 49154, True),
        # Rows that only pad the base's matrices are optional.
        ("lm_head.weight", 49152, False),
        ("lm_head.weight", 49000, False),
    ],
)
def test_added_tokens_without_their_tokenizer(
    name: str, rows: int, has_tokenizer: bool, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "m", modules_to_save=["embed_tokens", "lm_head"])
    file = folder / "adapter_model.safetensors"
    # Use one column, because the base's width is not checked here and would take 100 MB.
    save_file(load_file(file) | {f"base_model.model.{name}": np.ones((rows, 1), np.float16)}, file)
    if has_tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    problems = found("--adapter-root", str(tmp_path), "--preload", "a=m")
    lacks = says("ADAPTER_LACKS_TOKENIZER", rows=rows, base_rows=49152)
    is_refused = rows > 49152 and not has_tokenizer
    assert [lacks(problem) for problem in problems] == [True] * is_refused


def test_a_lora_without_tensors(tmp_path: Path) -> None:
    save_file({}, write_adapter(tmp_path / "m") / "adapter_model.safetensors")
    (problem,) = found("--adapter-root", str(tmp_path), "--preload", "a=m")
    assert says("NO_TENSORS")(problem)


def test_adapters_whose_tensors_are_damaged(tmp_path: Path) -> None:
    flags = ("--adapter-root", str(tmp_path), "--preload", "a=m")
    file = write_adapter(tmp_path / "m") / "adapter_model.safetensors"
    whole = file.read_bytes()
    for damaged, reason in (
        (whole[:50], "FILE_CUT_SHORT"),
        (whole[:-1], "FILE_CUT_SHORT"),
        (whole[:4], "FILE_CUT_SHORT"),
        (whole[:8] + b"?" + whole[9:], "NOT_JSON"),
    ):
        file.write_bytes(damaged)
        (problem,) = found(*flags)
        assert says(reason)(problem)
    file.write_bytes(whole)
    assert found(*flags) == []
    (tmp_path / "m" / "adapter_config.json").write_text("{")
    assert says("NOT_JSON")(found(*flags)[0])
